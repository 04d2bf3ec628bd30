"""Incoming frames: handed to one handler, one at a time and in order per peer."""

import logging
from functools import partial
from weakref import WeakValueDictionary

import trio

from pxd import wire
from pxd.p2p.framestreams import FrameStream
from pxd.p2p.muxer import StreamClosed
from pxd.p2p.network import FrameFilter, FrameHandler
from pxd.p2p.sessions import Session

log = logging.getLogger("pxd.p2p")


class FrameInbox:
    """Reads channels. While the handler waits nothing is read, which holds the peer back."""

    def __init__(self) -> None:
        self._handler: FrameHandler | None = None
        self._wants: FrameFilter = lambda *_: True
        self._streams: dict[str, FrameStream] = {}
        self._waiting: dict[str, trio.CancelScope] = {}
        # A lock lives as long as a task that uses it: the handler may outlive a channel.
        self._turns: WeakValueDictionary[str, trio.Lock] = WeakValueDictionary()

    def on_frame(self, handler: FrameHandler, wants: FrameFilter = lambda *_: True) -> None:
        self._handler, self._wants = handler, wants

    async def deliver(self, peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        if self._handler is None:
            log.warning("dropped a frame of %s: nobody handles frames yet", peer)
        else:
            await self._handler(peer, frame, body)

    async def receive(self, session: Session, stream: FrameStream) -> None:
        """Serve a channel until it or the session ends. A newer channel of the peer ends it too."""
        peer = session.peer
        if peer in self._streams:
            self._streams[peer].close()
            self._waiting[peer].cancel()
        self._streams[peer] = stream
        self._waiting[peer] = trio.CancelScope()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(_close_with_session, session, stream)
            try:
                await self._read(peer, stream)
            except StreamClosed as error:
                log.debug("the data channel of %s ended: %s", peer, error)
            except wire.WireError as error:
                log.warning("closing the data channel of %s: %s", peer, error)
            except Exception:
                log.exception("a frame of %s failed; closing its data channel", peer)
            finally:
                stream.close()
                if self._streams.get(peer) is stream:
                    del self._streams[peer], self._waiting[peer]
                nursery.cancel_scope.cancel()

    async def _read(self, peer: str, stream: FrameStream) -> None:
        # The turn is taken before a frame is read, so that a peer has one frame here at a time,
        # and by one that waits for it only as long as there is no newer channel.
        turn = self._turns.setdefault(peer, trio.Lock())
        with self._waiting[peer]:
            await turn.acquire()
        try:
            while self._streams.get(peer) is stream:
                frame, body = await wire.read_frame(
                    stream.read_exactly, wire.frame_decoder, wants=partial(self._wants, peer)
                )
                await self.deliver(peer, frame, body)
        finally:
            if turn.statistics().owner is trio.lowlevel.current_task():
                turn.release()


async def _close_with_session(session: Session, stream: FrameStream) -> None:
    await session.ended.wait()
    stream.close()
