"""Outgoing frames: one channel per peer, written by a task of its own, opened when first used."""

import logging
from collections.abc import Awaitable, Callable

import trio

from pxd import wire
from pxd.p2p.framestreams import FrameStream
from pxd.p2p.muxer import StreamClosed
from pxd.p2p.network import NetworkError, PeerUnreachable
from pxd.p2p.sessions import Session

log = logging.getLogger("pxd.p2p")

Opener = Callable[[Session], Awaitable[FrameStream]]

QUIET = 5.0
"""Seconds without a frame after which a channel may change over to another way."""


class _Channel:
    """A cancelled sender takes its frame back whole or not at all: `run` alone writes.

    Once `retired` nothing is lost, and a new channel takes the better way that there is now.
    """

    def __init__(self, session: Session) -> None:
        self.session = session
        self.failure = "the data channel broke"
        self.used = False
        self.retired = False
        self.entrance, self._exit = trio.open_memory_channel[tuple[bytes, wire.Buffer]](0)

    async def run(self, opener: Opener) -> None:
        stream: FrameStream | None = None
        try:
            async with self._exit, trio.open_nursery() as nursery:
                nursery.start_soon(self._end_with_session, nursery.cancel_scope)
                nursery.start_soon(self._end_when_shaken, nursery.cancel_scope)
                host = self.session.connection.host
                stream = await opener(self.session)
                nursery.start_soon(self._watch, stream, nursery.cancel_scope)
                while not self.retired:
                    with trio.move_on_after(QUIET) as quiet:
                        header, body = await self._exit.receive()
                    if quiet.cancelled_caught:
                        self.retired = self.session.connection.host != host
                    else:
                        self.used = True
                        await stream.write(header, body)
                nursery.cancel_scope.cancel()
        except* (StreamClosed, NetworkError) as group:
            self.failure = f"the data channel broke ({group.exceptions[0]})"
        finally:
            if stream:
                stream.close()

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
        while True:
            channel = self._channels.get(peer)
            if channel is None or channel.session is not session or channel.retired:
                channel = self._channels[peer] = _Channel(session)
                nursery.start_soon(self._run, channel)
            try:
                await channel.entrance.send((header, body))
                return
            except trio.BrokenResourceError:
                if not channel.retired:
                    self._drop(channel)
                    raise PeerUnreachable(f"{peer}: {channel.failure}") from None

    async def _run(self, channel: _Channel) -> None:
        try:
            await channel.run(self._opener)
        except Exception:
            log.exception("the data channel to %s failed", channel.session.peer)
        finally:
            if not channel.used or channel.retired or channel.session.ended.is_set():
                self._drop(channel)

    def _drop(self, channel: _Channel) -> None:
        if self._channels.get(channel.session.peer) is channel:
            del self._channels[channel.session.peer]
