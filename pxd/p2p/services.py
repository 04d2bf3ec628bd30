"""The calls this node answers: from a method's name and bytes to a handler, and back to bytes."""

import logging
from collections.abc import Awaitable, Callable
from typing import Any

import msgspec

from pxd.p2p.network import CallFailed, Method, RequestT, ResponseT
from pxd.wire import DECODE_ERRORS

MESSAGE_LIMIT = 4 << 20
"""Upper bound in bytes for an encoded request or response."""

log = logging.getLogger("pxd.p2p")


def encode_message(value: object) -> bytes:
    """Raises `CallFailed` ("too-large") beyond `MESSAGE_LIMIT`, so that the sender learns of it."""
    data = msgspec.msgpack.encode(value)
    if len(data) > MESSAGE_LIMIT:
        raise CallFailed("too-large", f"a message of {len(data)} bytes, {MESSAGE_LIMIT} allowed")
    return data


def decode_response(method: Method[Any, ResponseT], data: bytes) -> ResponseT:
    """Raises `CallFailed` ("bad-response") for bytes that are not of the method's type."""
    try:
        return method.response.decode(data)
    except DECODE_ERRORS as error:
        raise CallFailed("bad-response", str(error)) from error


class Services:
    """Handlers by method name."""

    def __init__(self) -> None:
        self._handlers: dict[
            str, tuple[Method[Any, Any], Callable[[str, Any], Awaitable[Any]]]
        ] = {}

    def add(
        self,
        method: Method[RequestT, ResponseT],
        handler: Callable[[str, RequestT], Awaitable[ResponseT]],
    ) -> None:
        """Raises ValueError when the name is taken."""
        if method.name in self._handlers:
            raise ValueError(f"{method.name} is served already")
        self._handlers[method.name] = (method, handler)

    async def answer(self, peer: str, name: str, payload: bytes) -> bytes:
        """Run the handler of `name` for `peer`; everything that goes wrong becomes `CallFailed`."""
        if name not in self._handlers:
            raise CallFailed("unknown-method", name)
        method, handler = self._handlers[name]
        if method.limit is not None and len(payload) > method.limit:
            message = f"a request of {len(payload)} bytes, {method.limit} allowed"
            raise CallFailed("too-large", message)
        try:
            request = method.request.decode(payload)
        except DECODE_ERRORS as error:
            raise CallFailed("bad-request", str(error)) from error
        try:
            return encode_message(await handler(peer, request))
        except CallFailed:
            raise
        except Exception as error:
            log.exception("%s from %s failed", name, peer)
            raise CallFailed("internal", f"{type(error).__name__} in {name}") from error
