"""`Network` without sockets, for tests of everything above it: same order, same errors, one loop.

Messages and frames are really encoded and decoded, so types and limits hold as on the wire.
"""

import logging
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field

import trio

from pxd import wire
from pxd.p2p.casts import DroppingQueue
from pxd.p2p.network import (
    CallFailed,
    CallTimeout,
    FrameFilter,
    FrameHandler,
    Method,
    PeerHandler,
    PeerUnreachable,
    RequestT,
    ResponseT,
)
from pxd.p2p.services import Services, decode_response, encode_message

log = logging.getLogger("pxd.p2p")

FRAMES_IN_FLIGHT = 16


class MemoryHub:
    """The air between `MemoryNetwork`s.

    With `mesh` every running network is connected to every other one, as by mDNS; without it only
    where one dials on demand (`learn` its address first) or `connect` is called. `cut` and `heal`
    break and restore the way between peers; both sides notice a cut at once.
    """

    def __init__(self, *, mesh: bool = True) -> None:
        self._mesh = mesh
        self._running: dict[str, MemoryNetwork] = {}
        self._cut: set[frozenset[str]] = set()

    def network(self, peer_id: str) -> "MemoryNetwork":
        return MemoryNetwork(self, peer_id)

    def connect(self, one: str, other: str) -> bool:
        """Connect two running networks; False when that is not possible now."""
        a, b = self._running.get(one), self._running.get(other)
        if a is None or b is None or a is b or frozenset((one, other)) in self._cut:
            return False
        if not a.linked(other):
            a.link(b)
            b.link(a)
        return True

    def cut(self, peer: str, *others: str) -> None:
        """Cut `peer` off from `others`, or from everybody who runs now."""
        for other in others or tuple(self._running):
            if other != peer:
                self._cut.add(frozenset((peer, other)))
                self._disconnect(peer, other)

    def heal(self, peer: str, *others: str) -> None:
        """Undo `cut`; with `mesh` the peers are connected again at once."""
        for pair in tuple(self._cut):
            if peer in pair and (not others or pair & set(others)):
                self._cut.remove(pair)
                if self._mesh:
                    self.connect(*pair)

    def add(self, network: "MemoryNetwork") -> None:
        if network.peer_id in self._running:
            raise ValueError(f"{network.peer_id} runs already")
        self._running[network.peer_id] = network
        if self._mesh:
            for other in tuple(self._running):
                self.connect(network.peer_id, other)

    def remove(self, network: "MemoryNetwork") -> None:
        for other in tuple(self._running):
            self._disconnect(network.peer_id, other)
        del self._running[network.peer_id]
        for other in self._running.values():
            if frozenset((network.peer_id, other.peer_id)) not in self._cut:
                other.nobody_there(network.peer_id)

    def _disconnect(self, one: str, other: str) -> None:
        for here, there in ((one, other), (other, one)):
            if here in self._running:
                self._running[here].unlink(there)


@dataclass(eq=False)
class _Call:
    done: trio.Event = field(default_factory=trio.Event)
    answer: bytes | Exception | None = None

    def finish(self, answer: bytes | Exception) -> None:
        if self.answer is None:
            self.answer = answer
            self.done.set()


@dataclass(eq=False)
class _Link:
    """What one network holds about the way to `target`."""

    target: "MemoryNetwork"
    frames: trio.MemorySendChannel[tuple[bytes, bytes]] | None = None
    casts: DroppingQueue[tuple[str, bytes]] | None = None
    pending: set[_Call] = field(default_factory=set)
    workers: set[trio.CancelScope] = field(default_factory=set)

    def close(self) -> None:
        for scope in self.workers:
            scope.cancel()
        if self.frames:
            self.frames.close()
        for call in self.pending:
            call.finish(PeerUnreachable(f"lost the connection to {self.target.peer_id}"))


class MemoryNetwork:
    """A `Network` on a `MemoryHub`; works while `run` runs."""

    def __init__(self, hub: MemoryHub, peer_id: str) -> None:
        self.peer_id = peer_id
        self._hub = hub
        self._links: dict[str, _Link] = {}
        self._known: dict[str, tuple[str, ...]] = {}
        self._services = Services()
        self._peer_handlers: list[PeerHandler] = []
        self._vanished_handlers: list[Callable[[str], None]] = []
        self._frame_handler: FrameHandler | None = None
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled; start with `await nursery.start(network.run)`."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            to_self = _Link(self)
            self._links[self.peer_id] = to_self
            try:
                self._hub.add(self)
                task_status.started()
                await trio.sleep_forever()
            finally:
                self._hub.remove(self)
                self._links.clear()
                to_self.close()
                self._nursery = None

    def linked(self, peer: str) -> bool:
        return peer in self._links

    def link(self, other: "MemoryNetwork") -> None:
        self._links[other.peer_id] = _Link(other)
        self._notify(other.peer_id, True)

    def unlink(self, peer: str) -> None:
        if peer != self.peer_id and peer in self._links:
            self._links.pop(peer).close()
            self._notify(peer, False)

    def addresses(self) -> tuple[str, ...]:
        return (f"/memory/{self.peer_id}/p2p/{self.peer_id}",)

    def peers(self) -> frozenset[str]:
        return frozenset(self._links) - {self.peer_id}

    def learn(self, peer: str, addresses: tuple[str, ...]) -> None:
        self._known[peer] = addresses

    def on_peer(self, handler: PeerHandler) -> None:
        self._peer_handlers.append(handler)

    def on_vanished(self, handler: Callable[[str], None]) -> None:
        self._vanished_handlers.append(handler)

    def nobody_there(self, peer: str) -> None:
        for handler in self._vanished_handlers:
            handler(peer)

    def serve(
        self,
        method: Method[RequestT, ResponseT],
        handler: Callable[[str, RequestT], Awaitable[ResponseT]],
    ) -> None:
        self._services.add(method, handler)

    def on_frame(self, handler: FrameHandler, wants: FrameFilter = lambda *_: True) -> None:
        self._frame_handler = handler

    async def call(
        self,
        peer: str,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float,
    ) -> ResponseT:
        payload = encode_message(request)
        link = self._way(peer)
        call = _Call()
        link.pending.add(call)
        there = link.target
        scope = there._start(link, there._answer, self.peer_id, method.name, payload, call)
        try:
            with trio.move_on_after(timeout):
                await call.done.wait()
        finally:
            scope.cancel()
            link.pending.discard(call)
        if call.answer is None:
            raise CallTimeout(f"{method.name}: no answer from {peer} within {timeout:g} s")
        if isinstance(call.answer, Exception):
            raise call.answer
        return decode_response(method, call.answer)

    def cast(self, peer: str, method: Method[RequestT, None], message: RequestT) -> None:
        payload = encode_message(message)
        try:
            link = self._way(peer)
        except PeerUnreachable as error:
            log.debug("dropped a %s: %s", method.name, error)
            return
        if link.casts is None:
            link.casts = DroppingQueue()
            link.target._start(link, link.target._serve_casts, self.peer_id, link.casts)
        link.casts.put((method.name, payload), len(payload))

    async def send(self, peer: str, frame: wire.Frame, body: wire.Buffer = b"") -> None:
        header = wire.encode(frame, len(body))
        link = self._way(peer)
        if link.frames is None:
            room = float("inf") if peer == self.peer_id else FRAMES_IN_FLIGHT
            link.frames, receiver = trio.open_memory_channel[tuple[bytes, bytes]](room)
            link.target._start(link, link.target._serve_frames, self.peer_id, receiver)
        try:
            await link.frames.send((header, bytes(body)))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            link.frames = None
            raise PeerUnreachable(f"the data channel to {peer} broke") from error

    def _notify(self, peer: str, up: bool) -> None:
        for handler in self._peer_handlers:
            handler(peer, up)

    def _way(self, peer: str) -> _Link:
        known = peer in self._links or peer in self._known
        if self._nursery is None or not known:
            raise PeerUnreachable(f"no connection to {peer} and no address of it")
        if peer not in self._links and not self._hub.connect(self.peer_id, peer):
            raise PeerUnreachable(f"{peer} cannot be reached")
        return self._links[peer]

    def _start(
        self, link: _Link, worker: Callable[..., Awaitable[None]], *arguments: object
    ) -> trio.CancelScope:
        """Run a worker of this network for as long as the peer's `link` to it holds."""
        assert self._nursery is not None, "a link leads to a network that runs"
        scope = trio.CancelScope()
        link.workers.add(scope)

        async def work() -> None:
            with scope:
                await worker(*arguments)
            link.workers.discard(scope)

        self._nursery.start_soon(work)
        return scope

    async def _answer(self, peer: str, name: str, payload: bytes, call: _Call) -> None:
        try:
            call.finish(await self._services.answer(peer, name, payload))
        except CallFailed as error:
            call.finish(error)

    async def _serve_casts(self, peer: str, casts: DroppingQueue[tuple[str, bytes]]) -> None:
        while True:
            name, payload = await casts.get()
            try:
                await self._services.answer(peer, name, payload)
            except CallFailed as error:
                log.debug("a %s from %s failed: %s", name, peer, error)

    async def _serve_frames(
        self, peer: str, frames: trio.MemoryReceiveChannel[tuple[bytes, bytes]]
    ) -> None:
        async with frames:
            async for data, body in frames:
                size = len(data) - wire.PREFIX_SIZE
                wire.decode_prefix(data[: wire.PREFIX_SIZE], wire.Limits())
                frame = wire.decode_header(data[-size:], len(body), wire.frame_decoder)
                if self._frame_handler is None:
                    continue
                try:
                    await self._frame_handler(peer, frame, body)
                except Exception:
                    log.exception("a frame from %s failed; closing its channel", peer)
                    return
