"""A node is drained by any member that asks it, and by nobody without it."""

import contextlib
from collections.abc import AsyncIterator

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.records import NodeRecord, Unfit
from pxd.p2p.network import CallFailed
from pxd.serving.drain import CHANGES_AT_ONCE, DRAIN, Drain, DrainError, Drains
from tests.memory_network import MemoryHub

from .harness import Member


class Node:
    """The parts of a daemon that a drain needs. `full` is a disk that takes nothing."""

    def __init__(self, hub: MemoryHub, name: str, members: dict[str, Member]) -> None:
        self.network = hub.network(name)
        self.members = members
        self.saved: list[bool] = []
        self.full = False
        members[name] = Member(NodeRecord(id=name, name=f"{name}-name"))
        self.forgiven = 0
        self.drains = Drains(self.network, lambda: members, self, self.save, self.forgive)

    def forgive(self) -> None:
        self.forgiven += 1

    async def save(self, *, drained: bool) -> None:
        await trio.lowlevel.checkpoint()
        if self.full:
            raise OSError(28, "No space left on device")
        self.saved.append(drained)

    @property
    def record(self) -> NodeRecord:
        return self.members[self.network.peer_id].record

    def update(self, **changes: object) -> None:
        self.members[self.network.peer_id].record = msgspec.structs.replace(self.record, **changes)


@contextlib.asynccontextmanager
async def two_nodes() -> AsyncIterator[tuple[Node, Node]]:
    hub, members = MemoryHub(), dict[str, Member]()
    pair = Node(hub, "a", members), Node(hub, "b", members)
    async with trio.open_nursery() as nursery:
        for node in pair:
            await nursery.start(node.network.run)
        yield pair
        nursery.cancel_scope.cancel()


async def test_another_node_and_oneself(clock: MockClock) -> None:
    async with two_nodes() as (a, b):
        done = await a.drains.set("b-name", drained=True)
        assert (done.node.id, done.drained, done.changed) == ("b", True, True)
        assert (b.record.drained, b.saved) == (True, [True])
        assert (await a.drains.set("b", drained=True)).changed is False
        assert (await b.drains.set("b", drained=False)).changed is True
        assert (b.record.drained, b.saved[-1], a.record.drained) == (False, False, False)


async def test_a_node_that_left_a_model_by_itself_is_resumed_the_same_way(
    clock: MockClock,
) -> None:
    async with two_nodes() as (a, b):
        b.update(unfit=(Unfit("m", "it keeps dying"),))
        done = await a.drains.set("b", drained=True)
        assert (done.changed, b.forgiven) == (True, 0)
        assert (await a.drains.set("b", drained=False)).changed
        assert (b.forgiven, b.saved) == (1, [True, False])
        b.update(unfit=())
        assert not (await a.drains.set("b", drained=False)).changed


async def test_what_is_not_written_down_is_not_so(clock: MockClock) -> None:
    async with two_nodes() as (a, b):
        a.full = b.full = True
        with pytest.raises(DrainError, match="cannot write") as own:
            await a.drains.set("a", drained=True)
        with pytest.raises(DrainError, match="cannot write") as other:
            await a.drains.set("b", drained=True)
        assert (own.value.code, other.value.code) == ("storage", "unreachable")
        assert (a.record.drained, b.record.drained) == (False, False)


async def test_unknown_and_unreachable_nodes(clock: MockClock) -> None:
    async with two_nodes() as (a, b):
        with pytest.raises(DrainError, match="no such node"):
            await a.drains.set("c", drained=True)
        b.members["gone"] = Member(NodeRecord(id="gone", name="gone"), "dead")
        with pytest.raises(DrainError, match=r"gone \(dead\) was asked"):
            await a.drains.set("gone", drained=True)


async def test_a_member_cannot_keep_a_disk_busy(clock: MockClock) -> None:
    async with two_nodes() as (a, b):
        for number in range(int(CHANGES_AT_ONCE)):
            await a.network.call("b", DRAIN, Drain(number % 2 == 0), timeout=5)
        with pytest.raises(CallFailed, match="too often"):
            await a.network.call("b", DRAIN, Drain(True), timeout=5)
        assert len(b.saved) == CHANGES_AT_ONCE
