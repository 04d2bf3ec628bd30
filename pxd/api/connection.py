"""One HTTP/1.1 connection: hypercorn's, with the edges that a daemon cannot live with taken off."""

import trio
from h11 import Request
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.protocol.h11 import H11Protocol
from hypercorn.trio.task_group import TaskGroup
from hypercorn.trio.tcp_server import TCPServer
from hypercorn.trio.worker_context import WorkerContext
from hypercorn.typing import AppWrapper, ConnectionState
from hypercorn.utils import parse_socket_addr

SEND_TIMEOUT_S = 30.0
PIECE_BYTES = 64 << 10


class _Http11(H11Protocol):
    async def _check_protocol(self, event: Request) -> None:
        """Stay with HTTP/1.1, whatever the client proposes: no client of ours needs HTTP/2."""


class Connection(TCPServer):
    """Overrides private methods of hypercorn 0.18, to which pyproject.toml holds it."""

    stream: trio.SocketStream  # type: ignore[assignment]

    def __init__(
        self, app: AppWrapper, config: Config, context: WorkerContext, stream: trio.SocketStream
    ) -> None:
        super().__init__(app, config, context, ConnectionState({}), stream)  # type: ignore[arg-type]

    async def run(self) -> None:
        try:
            sock = self.stream.socket
            client = parse_socket_addr(sock.family, sock.getpeername())
            server = parse_socket_addr(sock.family, sock.getsockname())
        except OSError:
            return  # Gone before it was served.
        async with TaskGroup() as tasks:
            self._task_group = tasks
            self.protocol = _Http11(  # type: ignore[assignment]
                self.app,
                self.config,
                self.context,
                tasks,
                ConnectionState(self.state),
                False,
                client,
                server,
                self.protocol_send,
            )
            await self.protocol.initiate()
            await self.idle_task.restart(tasks, self._idle_timeout)
            await self._read_data()
            # Who has hung up is not to take up a connection until it has been idle for long.
            await self.idle_task.stop()

    async def protocol_send(self, event: Event) -> None:
        """A client that takes less than `PIECE_BYTES`, or what there is, in `SEND_TIMEOUT_S` is
        dropped.

        hypercorn waits for it forever, and shields that wait from the daemon's own end.
        """
        if not isinstance(event, RawData):
            await super().protocol_send(event)
            return
        async with self.send_lock:
            try:
                for begin in range(0, len(event.data), PIECE_BYTES):
                    with trio.fail_after(SEND_TIMEOUT_S):
                        await self.stream.send_all(event.data[begin : begin + PIECE_BYTES])
            except (trio.BrokenResourceError, trio.ClosedResourceError, trio.TooSlowError):
                await trio.aclose_forcefully(self.stream)
                await self.protocol.handle(Closed())
            except trio.Cancelled:
                # Half a message is on its way: nothing sensible can follow it.
                await trio.aclose_forcefully(self.stream)
                raise
