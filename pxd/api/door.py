"""Control routes for the cluster's keys and bans."""

from typing import Annotated, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pxd.api.body import read_json_body
from pxd.api.control import require_control
from pxd.api.daemon import Daemon
from pxd.api.errors import INVALID, SERVER, ApiError, json_response
from pxd.serving.door import DoorError
from pxd.wire import DECODE_ERRORS, Identifier

_STATUS = {"unknown_node": 404, "own_node": 409, "full": 409, "storage": 500}

BodyT = TypeVar("BodyT")


class RotateBody(msgspec.Struct, forbid_unknown_fields=True):
    """`grace` in seconds."""

    grace: Annotated[float, msgspec.Meta(ge=0)]


class KickBody(msgspec.Struct, forbid_unknown_fields=True):
    """`node` is a name, a peer id or the beginning of one; `rotate` replaces the key as well."""

    node: Identifier
    rotate: bool = False


class PardonBody(msgspec.Struct, forbid_unknown_fields=True):
    node: Identifier


class DoorRoutes:
    """The endpoints. All of them need the control token."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def rotate(self, request: Request) -> Response:
        body = await self._body(request, RotateBody)
        try:
            return _answer(await self._daemon.door.rotate(body.grace))
        except DoorError as error:
            raise _refusal(error) from error

    async def kick(self, request: Request) -> Response:
        body = await self._body(request, KickBody)
        try:
            return _answer(await self._daemon.door.kick(body.node, rotate=body.rotate))
        except DoorError as error:
            raise _refusal(error) from error

    async def pardon(self, request: Request) -> Response:
        body = await self._body(request, PardonBody)
        try:
            return _answer(await self._daemon.door.pardon(body.node))
        except DoorError as error:
            raise _refusal(error) from error

    async def bans(self, request: Request) -> Response:
        self._check(request)
        bans = [
            {"id": ban.peer, "name": ban.name, "by": ban.by} for ban in self._daemon.door.banned()
        ]
        return _answer({"bans": bans})

    def _check(self, request: Request) -> None:
        require_control(request, self._daemon.control_token)

    async def _body(self, request: Request, kind: type[BodyT]) -> BodyT:
        self._check(request)
        return parse_body(await read_json_body(request), kind)


def parse_body(data: bytes, kind: type[BodyT]) -> BodyT:
    """Raises `ApiError` 400."""
    try:
        return msgspec.json.decode(data, type=kind)
    except DECODE_ERRORS as error:
        raise ApiError(400, f"Bad request: {error}", code="bad_request") from error


def _answer(content: object) -> Response:
    return json_response(content, headers={"cache-control": "no-store"})


def _refusal(error: DoorError) -> ApiError:
    status = _STATUS.get(error.code, 400)
    kind = SERVER if status >= 500 else INVALID
    return ApiError(status, str(error), type=kind, code=error.code)
