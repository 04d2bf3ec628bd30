"""Nodes that share models, in one trio loop: the real services and files, an in-memory network."""

import contextlib
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import trio

from pxd.cluster.records import HeldModel, NodeRecord
from pxd.serving.weights.sharing import Sharing
from pxd.wire import Buffer, Frame, Weights
from tests.memory_network import MemoryHub, MemoryNetwork

from .harness import Member

MODEL = "/models/tiny"


class Lender:
    """One node. `received` counts bytes by sender; `meanwhile` is called with how many bytes have
    come before each further frame."""

    def __init__(self, cluster: "Lenders", name: str, root: Path) -> None:
        self.network = cluster.hub.network(name)
        self.busy = False
        self.sharing = Sharing(
            self.network,
            root / f"cache-{name}",
            lambda: cluster.members,
            lambda: cluster.leader,
            lambda: self.busy,
            lambda: cluster.announce(name),
        )
        self.network.on_frame(self.on_frame)
        self.received: dict[str, int] = {}
        self.meanwhile: Callable[[int], None] = lambda _: None

    async def on_frame(self, peer: str, frame: Frame, body: Buffer) -> None:
        assert isinstance(frame, Weights)
        self.meanwhile(sum(self.received.values()))
        if self.sharing.expects(peer, frame):
            self.received[peer] = self.received.get(peer, 0) + frame.size
        self.sharing.arrived(peer, frame, body)

    async def fetch(self, start: int, end: int, seen: list[float] | None = None) -> Path:
        def progress(done: float, words: str = "") -> None:
            if seen is not None:
                seen.append(done)

        return await self.sharing.fetch.layers(MODEL, "", start, end, progress)


class Lenders:
    def __init__(self, root: Path, *names: str) -> None:
        self.hub = MemoryHub()
        self.leader: str | None = names[0]
        self.members = {name: Member(NodeRecord(id=name, name=name, started=1.0)) for name in names}
        self.nodes = {name: Lender(self, name, root) for name in names}

    def add(self, name: str) -> MemoryNetwork:
        """A node that says that it has the model, and of which the caller is the rest."""
        self.members[name] = Member(NodeRecord(id=name, name=name, started=1.0))
        self.announce(name)
        return self.hub.network(name)

    def announce(self, name: str, model: str = MODEL) -> None:
        self.members[name].record = NodeRecord(
            id=name, name=name, started=1.0, models=(HeldModel(model, "mark"),)
        )

    def give(self, name: str, directory: Path) -> None:
        """`directory` is the model at this node, and nowhere else."""
        library = self.nodes[name].sharing.library
        library.elsewhere = lambda *_: directory  # type: ignore[method-assign]
        self.announce(name)

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator[trio.Nursery]:
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                await nursery.start(node.network.run)
            yield nursery
            nursery.cancel_scope.cancel()
