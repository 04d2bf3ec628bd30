"""Outgoing frames: one channel per peer, written by a task of its own, opened when first used.

A channel through a relay is given up for a direct one as soon as there can be one, between frames;
any other one for a better way once nothing was sent for a while.
"""

import logging
from collections.abc import Awaitable, Callable

import trio

from pxd import wire
from pxd.p2p.framestreams import FrameStream, Libp2pFrames
from pxd.p2p.muxer import StreamClosed
from pxd.p2p.network import NetworkError, PeerUnreachable
from pxd.p2p.sessions import Session
from pxd.p2p.tls import TlsStream

log = logging.getLogger("pxd.p2p")

Opener = Callable[[Session], Awaitable[FrameStream]]

QUIET = 5.0
"""Seconds without a frame after which a channel may change over to another way."""


class _Channel:
    """A cancelled sender takes its frame back whole or not at all: `run` writes, or the sender what
    needs no waiting while `run` has nothing to do."""

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failure = "the data channel broke"
        self.used = False
        self._used_at = 0.0
        self._idle: TlsStream | None = None
        self.entrance, self._exit = trio.open_memory_channel[tuple[bytes, wire.Buffer]](0)

    async def send(self, header: bytes, body: wire.Buffer) -> None:
        """Raises `trio.BrokenResourceError` when the channel has ended."""
        stream = self._idle
        if stream is not None and stream.write_now(header, body):
            self.used, self._used_at = True, trio.current_time()
            if not stream.unsent:
                return
            header, body = b"", b""
        # From now on `run` has something to do, even if it has not noticed yet.
        self._idle = None
        await self.entrance.send((header, body))

    async def run(self, opener: Opener) -> None:
        try:
            async with self._exit, trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with_session, nursery.cancel_scope)
                nursery.start_soon(self._end_when_shaken, nursery.cancel_scope)
                while True:
                    host = self.session.connection.host
                    stream = await opener(self.session)
                    await self._use(stream, host, nursery.cancel_scope)
        except* (StreamClosed, NetworkError) as group:
            error: BaseException = group
            while isinstance(error, BaseExceptionGroup):
                error = error.exceptions[0]
            self.failure = f"the data channel broke ({error})"

    async def _use(self, stream: FrameStream, host: str, scope: trio.CancelScope) -> None:
        """Returns when there is a better way and nothing is left on this one; else cancels `scope`
        or raises."""
        try:
            if isinstance(stream, Libp2pFrames) and stream.relayed:
                await self._write(stream, host, scope, self.session.wait_direct)
                await stream.drain()
            else:
                await self._write(stream, host, scope, trio.sleep_forever)
        finally:
            self._idle = None
            stream.close()

    async def _write(
        self,
        stream: FrameStream,
        host: str,
        scope: trio.CancelScope,
        wait_better: Callable[[], Awaitable[None]],
    ) -> None:
        better = trio.Event()
        waiting = trio.CancelScope()

        async def watch_for_better() -> None:
            await wait_better()
            better.set()
            waiting.cancel()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._watch, stream, scope)
            nursery.start_soon(watch_for_better)
            self._used_at = trio.current_time()
            while not better.is_set():
                frame = None
                with trio.CancelScope() as waiting, trio.move_on_at(self._used_at + QUIET):
                    # Nobody may overtake those who wait already.
                    if not self._exit.statistics().tasks_waiting_send:
                        self._idle = stream if isinstance(stream, TlsStream) else None
                    frame = await self._exit.receive()
                self._idle = None
                if frame or (isinstance(stream, TlsStream) and stream.unsent):
                    self.used, self._used_at = True, trio.current_time()
                    await stream.write(*(frame or ()))
                elif trio.current_time() >= self._used_at + QUIET:
                    if self.session.connection.host != host:
                        break
                    self._used_at = trio.current_time()
            nursery.cancel_scope.cancel()

    async def _end_with_session(self, scope: trio.CancelScope) -> None:
        await self.session.ended.wait()
        self.failure = "lost the connection"
        scope.cancel()

    async def _end_when_shaken(self, scope: trio.CancelScope) -> None:
        """TCP would notice only after a long while that its way is gone."""
        await self.session.shaken.wait()
        self.failure = "a connection broke"
        scope.cancel()

    async def _watch(self, stream: FrameStream, scope: trio.CancelScope) -> None:
        """Nothing ever arrives here but the end, which a writer at rest would not notice."""
        try:
            await stream.read_exactly(1)
        except StreamClosed as error:
            self.failure = f"the peer closed the data channel ({error})"
        scope.cancel()


class FrameOutbox:
    """Channels to all peers."""

    def __init__(self, opener: Opener) -> None:
        self._opener = opener
        self._channels: dict[str, _Channel] = {}

    async def send(
        self, nursery: trio.Nursery, session: Session, header: bytes, body: wire.Buffer
    ) -> None:
        """Hand a frame over; its channel runs in `nursery`. Raises `PeerUnreachable`.

        When a channel breaks after frames were sent on it, this raises once, so that the caller
        learns that some may be lost; the next call opens a new channel.
        """
        peer = session.peer
        channel = self._channels.get(peer)
        if channel is None or channel.session is not session:
            channel = self._channels[peer] = _Channel(session)
            nursery.start_soon(self._run, channel)
        try:
            await channel.send(header, body)
        except trio.BrokenResourceError:
            self._drop(channel)
            raise PeerUnreachable(f"{peer}: {channel.failure}") from None

    async def _run(self, channel: _Channel) -> None:
        try:
            await channel.run(self._opener)
        except Exception:
            log.exception("the data channel to %s failed", channel.session.peer)
        finally:
            if not channel.used or channel.session.ended.is_set():
                self._drop(channel)

    def _drop(self, channel: _Channel) -> None:
        if self._channels.get(channel.session.peer) is channel:
            del self._channels[channel.session.peer]
