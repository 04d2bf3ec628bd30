"""Control routes for what operators do: drain nodes, choose models."""

from typing import Annotated, TypeVar

import msgspec
from starlette.requests import Request
from starlette.responses import Response

from pxd.api.body import read_json_body
from pxd.api.control import require_control
from pxd.api.daemon import Daemon
from pxd.api.door import parse_body
from pxd.api.errors import INVALID, SERVER, ApiError, json_response
from pxd.models.quantized import Bits
from pxd.serving.choice import ChoiceError
from pxd.serving.drain import DrainError
from pxd.wire import Identifier

_STATUS = {
    "unknown_node": 404,
    "unknown_model": 404,
    "bad_model": 400,
    "full": 409,
    "not_settled": 503,
    "unreachable": 503,
    "in_use": 409,
    "storage": 500,
}

BodyT = TypeVar("BodyT")
ModelName = Annotated[str, msgspec.Meta(min_length=1, max_length=512)]


class NodeBody(msgspec.Struct, forbid_unknown_fields=True):
    """`node` is a name, a peer id or the beginning of one."""

    node: Identifier


class UseBody(msgspec.Struct, forbid_unknown_fields=True):
    """With `only`, the other models end once this one is served."""

    model: ModelName
    only: bool = False


class AddBody(msgspec.Struct, forbid_unknown_fields=True):
    """With `quantize`, a copy with so many bits for each weight."""

    model: ModelName
    quantize: Bits | None = None


class ModelBody(msgspec.Struct, forbid_unknown_fields=True):
    model: ModelName


class OperationRoutes:
    """The endpoints. All of them need the control token."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon

    async def drain(self, request: Request) -> Response:
        return await self._set_drained(request, drained=True)

    async def resume(self, request: Request) -> Response:
        return await self._set_drained(request, drained=False)

    async def _set_drained(self, request: Request, *, drained: bool) -> Response:
        body = await self._body(request, NodeBody)
        try:
            return _answer(await self._daemon.drains.set(body.node, drained=drained))
        except DrainError as error:
            raise _refusal(error) from error

    async def use(self, request: Request) -> Response:
        body = await self._body(request, UseBody)
        try:
            return _answer(await self._daemon.choices.use(body.model, only=body.only))
        except ChoiceError as error:
            raise _refusal(error) from error

    async def stop(self, request: Request) -> Response:
        body = await self._body(request, ModelBody)
        try:
            return _answer(await self._daemon.choices.stop(body.model))
        except ChoiceError as error:
            raise _refusal(error) from error

    async def add(self, request: Request) -> Response:
        body = await self._body(request, AddBody)
        try:
            return _answer(await self._daemon.added.add(body.model, body.quantize))
        except ChoiceError as error:
            raise _refusal(error) from error

    async def remove(self, request: Request) -> Response:
        body = await self._body(request, ModelBody)
        try:
            return _answer(await self._daemon.added.remove(body.model))
        except ChoiceError as error:
            raise _refusal(error) from error

    async def _body(self, request: Request, kind: type[BodyT]) -> BodyT:
        require_control(request, self._daemon.control_token)
        return parse_body(await read_json_body(request), kind)


def _answer(content: object) -> Response:
    return json_response(content, headers={"cache-control": "no-store"})


def _refusal(error: DrainError | ChoiceError) -> ApiError:
    status = _STATUS[error.code]
    kind = SERVER if status >= 500 else INVALID
    return ApiError(status, str(error), type=kind, code=error.code)
