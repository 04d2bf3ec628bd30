"""Answers a client that is still sending its request."""

import trio
from starlette.types import ASGIApp, Message, Receive, Scope, Send

LINGER_S = 3.0
LINGER_BYTES = 64 << 20


class Drain:
    """Around an app: takes the rest of a body that the app did not read, before the response ends.

    hypercorn queues a body's pieces for the app and closes a connection by queueing one thing more,
    which never ends when the app has stopped reading and the queue is full. And a connection that
    is closed over unread bytes is reset, which can cost the client the response.
    """

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        complete = False

        async def tracked_receive() -> Message:
            nonlocal complete
            message = await receive()
            complete = not message.get("more_body", False)
            return message

        async def tracked_send(message: Message) -> None:
            last = message["type"] == "http.response.body" and not message.get("more_body", False)
            if complete or not last:
                await send(message)
                return
            await send({**message, "more_body": True})
            await _linger(tracked_receive)
            await _send_while_draining(receive, send)

        await self._app(scope, tracked_receive, tracked_send)


async def _linger(receive: Receive) -> None:
    """Discard what the client sends until it is done, or has had its chance."""
    taken = 0
    with trio.move_on_after(LINGER_S):
        while taken < LINGER_BYTES:
            message = await receive()
            taken += len(message.get("body", b""))
            if not message.get("more_body", False):
                return


async def _send_while_draining(receive: Receive, send: Send) -> None:
    async with trio.open_nursery() as nursery:

        async def drain() -> None:
            while True:
                await receive()

        nursery.start_soon(drain)
        await send({"type": "http.response.body", "body": b"", "more_body": False})
        nursery.cancel_scope.cancel()
