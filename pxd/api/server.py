"""Serves the API on hypercorn's trio worker, as one more task of the daemon."""

import contextlib
import ipaddress
import logging
from functools import partial

import msgspec
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.trio.worker_context import WorkerContext
from starlette.types import ASGIApp

from pxd.api.connection import Connection
from pxd.api.drain import Drain
from pxd.api.errors import OVERLOADED, ApiError

log = logging.getLogger("pxd.api")

MAX_CONNECTIONS = 1024
MAX_TURNED_AWAY = 64
TURN_AWAY_S = 1.0
BACKLOG = 256
IDLE_TIMEOUT_S = 30.0
GRACE_S = 3.0


class BindError(OSError):
    """The API's address cannot be had; the message says what to do."""


async def _bind(host: str, port: int) -> list[trio.SocketListener]:
    try:
        listeners = await trio.open_tcp_listeners(port, host=host, backlog=BACKLOG)
    except OSError as error:
        shown = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        raise BindError(
            f"the API cannot listen on {shown} ({error.strerror or error}); "
            "choose another address with --http HOST:PORT"
        ) from error
    if port != 0:
        return list(listeners)
    # A name with several addresses got another free port on each; the daemon has one URL.
    for surplus in listeners[1:]:
        surplus.socket.close()
    return [listeners[0]]


def _url(listener: trio.SocketListener) -> str:
    """Where to reach a listener from this machine."""
    host, port = listener.socket.getsockname()[:2]
    address = ipaddress.ip_address(host.partition("%")[0])
    if address.is_unspecified:
        host = "127.0.0.1" if address.version == 4 else "::1"
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def _config() -> Config:
    config = Config()
    config.accesslog = None
    config.errorlog = log
    config.include_server_header = False
    config.h11_max_incomplete_size = 32 << 10
    config.keep_alive_timeout = IDLE_TIMEOUT_S
    return config


def _full() -> bytes:
    """The answer to a connection that there is no room for."""
    error = ApiError(429, "Too many connections are open", type=OVERLOADED, code="overloaded")
    body = msgspec.json.encode(error.body())
    return (
        b"HTTP/1.1 429 Too Many Requests\r\n"
        b"content-type: application/json\r\n"
        b"content-length: %d\r\n"
        b"retry-after: 5\r\n"
        b"connection: close\r\n\r\n"
    ) % len(body) + body


class _Server:
    def __init__(self, app: ASGIApp) -> None:
        self._app = ASGIWrapper(Drain(app))  # type: ignore[arg-type]
        self._config = _config()
        self.context = WorkerContext(None)
        self._connections = self._turned_away = 0
        self._full = _full()

    async def handle(self, stream: trio.SocketStream) -> None:
        """One connection. What goes wrong with it must not reach the others, nor the daemon."""
        if self._connections >= MAX_CONNECTIONS:
            log.warning("refusing a connection: %d are open already", self._connections)
            await self._turn_away(stream)
            return
        self._connections += 1
        try:
            await Connection(self._app, self._config, self.context, stream).run()
        except* Exception:
            log.exception("a connection failed; this is a bug in pxd or hypercorn")
        finally:
            self._connections -= 1

    async def _turn_away(self, stream: trio.SocketStream) -> None:
        """Say that there is no room, unless too many are just being told."""
        if self._turned_away < MAX_TURNED_AWAY:
            self._turned_away += 1
            try:
                with (
                    trio.move_on_after(TURN_AWAY_S),
                    contextlib.suppress(trio.BrokenResourceError),
                ):
                    await stream.send_all(self._full)
                    await stream.send_eof()
                    # Closing over unread bytes resets the connection, and the answer may be lost.
                    while await stream.receive_some(65536):
                        pass
            finally:
                self._turned_away -= 1
        await trio.aclose_forcefully(stream)


async def serve(
    app: ASGIApp,
    host: str,
    port: int,
    *,
    shutdown: trio.Event | None = None,
    grace: float = GRACE_S,
    task_status: "trio.TaskStatus[str]" = trio.TASK_STATUS_IGNORED,
) -> None:
    """Serve until `shutdown`, then let running requests end for up to `grace` seconds.

    Port 0 takes any free port. `task_status` gets the URL at which this machine reaches the API,
    once it can be reached. Raises `BindError` before that. Cancelling it closes everything at once.
    """
    listeners = await _bind(host, port)
    shutdown = trio.Event() if shutdown is None else shutdown
    server = _Server(app)
    async with trio.open_nursery() as connections:
        async with trio.open_nursery() as accepting:
            accepting.start_soon(
                partial(trio.serve_listeners, server.handle, listeners, handler_nursery=connections)
            )
            task_status.started(_url(listeners[0]))
            await shutdown.wait()
            accepting.cancel_scope.cancel()
        await server.context.terminated.set()
        connections.cancel_scope.deadline = trio.current_time() + grace
