"""Casts and frames that a node sends to itself: the same order and handlers, no network."""

import logging

import trio

from pxd import wire
from pxd.p2p.casts import DroppingQueue
from pxd.p2p.inbox import FrameInbox
from pxd.p2p.network import CallFailed
from pxd.p2p.services import Services

log = logging.getLogger("pxd.p2p")


class Loopback:
    """Works while `run` runs."""

    def __init__(self, peer_id: str, services: Services, inbox: FrameInbox) -> None:
        self._peer_id = peer_id
        self._services = services
        self._inbox = inbox
        self._casts: DroppingQueue[tuple[str, bytes]] = DroppingQueue()
        # Unbounded: a frame handler that sends to its own node must not wait for itself.
        self._entrance, self._frames = trio.open_memory_channel[tuple[wire.Frame, wire.Buffer]](
            float("inf")
        )
        self._queued = 0
        self._handling: trio.Event | None = None

    def cast(self, method: str, payload: bytes) -> None:
        self._casts.put((method, payload), len(payload))

    async def send(self, frame: wire.Frame, body: wire.Buffer) -> None:
        """Handle a frame here and now, or after those before it where there are any."""
        if self._handling is None and not self._queued:
            await self._handle(frame, body)
        else:
            self._queued += 1
            self._entrance.send_nowait((frame, body))
            await trio.lowlevel.checkpoint()

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._serve_casts)
            nursery.start_soon(self._serve_frames)

    async def _serve_casts(self) -> None:
        while True:
            name, payload = await self._casts.get()
            try:
                await self._services.answer(self._peer_id, name, payload)
            except CallFailed as error:
                log.debug("a %s to this node failed: %s", name, error)

    async def _serve_frames(self) -> None:
        async for frame, body in self._frames:
            if self._handling is not None:
                await self._handling.wait()
            try:
                await self._handle(frame, body)
            finally:
                self._queued -= 1

    async def _handle(self, frame: wire.Frame, body: wire.Buffer) -> None:
        self._handling = done = trio.Event()
        try:
            await self._inbox.deliver(self._peer_id, frame, body)
        except Exception:
            log.exception("a frame to this node failed")
        finally:
            self._handling = None
            done.set()
