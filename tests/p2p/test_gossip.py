"""Gossip over the in-memory network, in virtual time (pytest-trio's autojump clock)."""

import logging
from collections.abc import Callable

import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.leadership import TookOffice
from pxd.cluster.members import MemberEvent
from pxd.cluster.messages import Delta, GossipMessage, News
from pxd.cluster.records import NodeRecord
from pxd.p2p.gossip import GOSSIP, Gossip, GossipEvent
from tests.memory_network import MemoryHub, MemoryNetwork
from tests.signers import FakeSigner, signed

LIMIT = 30.0


class Node:
    """A gossiping node on a hub, with what it persisted and what it told its listeners."""

    def __init__(self, hub: MemoryHub, name: str, *, alone: bool = False) -> None:
        self.network: MemoryNetwork = hub.network(name)
        record = NodeRecord(id=name, name=name, incarnation=1, addresses=self.network.addresses())
        self.persisted: list[tuple[int, int]] = []
        self.persist_delay = 0.0
        self.events: list[tuple[GossipEvent, int]] = []
        self.gossip = Gossip(
            self.network,
            record,
            signer=FakeSigner(name),
            seed=len(name),
            term=0,
            expects_peers=not alone,
            persist=self.persist,
        )
        self.gossip.on_event(lambda event: self.events.append((event, self.gossip.leads)))
        self.scope = trio.CancelScope()

    async def persist(self, incarnation: int, term: int) -> None:
        await trio.sleep(self.persist_delay)
        self.persisted.append((incarnation, term))

    async def run(self, *, task_status: trio.TaskStatus[None] = trio.TASK_STATUS_IGNORED) -> None:
        with self.scope:
            async with trio.open_nursery() as nursery:
                await nursery.start(self.network.run)
                await nursery.start(self.gossip.run)
                task_status.started()

    def states(self) -> dict[str, str]:
        return {id_: member.state for id_, member in self.gossip.members.items()}

    def kinds(self, node: str) -> list[str]:
        return [
            event.kind
            for event, _ in self.events
            if isinstance(event, MemberEvent) and event.record.id == node
        ]

    async def until(self, condition: Callable[[], bool]) -> None:
        with trio.fail_after(LIMIT):
            while not condition():
                await self.gossip.wait_changed()


async def start(nursery: trio.Nursery, hub: MemoryHub, *names: str) -> list[Node]:
    nodes = [Node(hub, name, alone=name == names[0]) for name in names]
    for node in nodes:
        await nursery.start(node.run)
    return nodes


async def settle(*nodes: Node) -> None:
    """All see all alive and settled, and the first one in office."""
    names = {node.gossip.record.id for node in nodes}
    for node in nodes:
        await node.until(
            lambda node=node: (
                {n for n, s in node.states().items() if s == "alive"} == names  # type: ignore[misc]
                and all(m.record.seniority for m in node.gossip.members.values())
                and node.gossip.members[nodes[0].gossip.record.id].record.leads > 0
            )
        )


@pytest.fixture
def hub() -> MemoryHub:
    return MemoryHub()


async def test_nodes_find_each_other_and_follow_the_first(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    nodes = await start(nursery, hub, "a", "b", "c")
    await settle(*nodes)
    assert [node.gossip.leader for node in nodes] == ["a", "a", "a"]
    assert [node.gossip.leads for node in nodes] == [1, 0, 0]
    assert sorted(node.gossip.record.seniority for node in nodes)[0] == 1
    assert nodes[0].persisted == [(1, 1)]


async def test_a_changed_record_reaches_everybody(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    nodes = await start(nursery, hub, "a", "b", "c")
    await settle(*nodes)
    nodes[2].gossip.update(memory=123)
    for node in nodes[:2]:
        await node.until(lambda node=node: node.gossip.members["c"].record.memory == 123)  # type: ignore[misc]


async def test_a_killed_node_is_suspected_within_a_second_and_then_declared_dead(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    nodes = await start(nursery, hub, "a", "b", "c")
    await settle(*nodes)
    killed_at = trio.current_time()
    nodes[0].scope.cancel()
    await nodes[1].until(lambda: nodes[1].states()["a"] == "suspect")
    assert trio.current_time() - killed_at < 1
    await nodes[1].until(lambda: nodes[1].states()["a"] == "dead")
    assert trio.current_time() - killed_at < 5
    await nodes[1].until(lambda: nodes[1].gossip.leads == 2)
    await nodes[2].until(lambda: nodes[2].gossip.leader == "b")


async def test_a_goodbye_is_heard_before_leave_returns(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    nodes = await start(nursery, hub, "a", "b", "c")
    await settle(*nodes)
    await nodes[0].gossip.leave(5)
    assert [node.states()["a"] for node in nodes] == ["left", "left", "left"]
    nodes[0].scope.cancel()
    await nodes[1].until(lambda: nodes[1].gossip.leads == 2)
    assert "suspected" not in nodes[1].kinds("a") + nodes[2].kinds("a")


async def test_leaving_does_not_wait_longer_than_told(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = Node(hub, "a", alone=True), Node(hub, "b")
    receive, wedged = b.gossip._receive, trio.Event()

    async def receive_until_wedged(peer: str, message: GossipMessage) -> None:
        if wedged.is_set():
            await trio.sleep_forever()
        await receive(peer, message)

    b.gossip._receive = receive_until_wedged  # type: ignore[method-assign]
    await nursery.start(a.run)
    await nursery.start(b.run)
    await settle(a, b)
    wedged.set()
    before = trio.current_time()
    await a.gossip.leave(2)
    assert trio.current_time() - before == pytest.approx(2)


async def test_a_cut_off_node_comes_back_with_a_new_persisted_incarnation(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b, c = await start(nursery, hub, "a", "b", "c")
    await settle(a, b, c)
    hub.cut("c")
    await a.until(lambda: a.states()["c"] == "dead")
    await c.until(lambda: c.gossip.leads > 0)
    hub.heal("c")
    await settle(a, b, c)
    await c.until(lambda: c.gossip.leads == 0)
    assert c.gossip.record.incarnation > 1
    assert c.persisted[-1][0] == c.gossip.record.incarnation
    assert a.kinds("c").count("joined") == 2
    await a.until(lambda: a.gossip.leads == a.gossip.term == c.gossip.term)


async def test_addresses_in_records_lead_to_nodes_nobody_connected_to(
    autojump_clock: MockClock, nursery: trio.Nursery
) -> None:
    hub = MemoryHub(mesh=False)
    a, b, c = await start(nursery, hub, "a", "b", "c")
    hub.connect("a", "b")
    hub.connect("b", "c")
    await settle(a, b, c)
    with trio.fail_after(LIMIT):
        while "c" not in a.network.peers():
            await trio.sleep(0.5)
    assert a.states()["c"] == "alive"


async def test_a_term_is_announced_only_once_it_is_persisted(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    node = Node(hub, "a", alone=True)
    node.persist_delay = 3.0
    await nursery.start(node.run)
    await trio.sleep(2)
    assert node.gossip.leader == "a"
    assert (node.gossip.leads, node.gossip.record.leads) == (0, 0)
    await node.until(lambda: node.gossip.record.leads == 1)
    assert node.persisted == [(1, 1)]
    assert [leads for event, leads in node.events if isinstance(event, TookOffice)] == [1]


async def test_a_full_disk_does_not_stop_the_node(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    hub: MemoryHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    node = Node(hub, "a", alone=True)

    async def full(incarnation: int, term: int) -> None:
        raise OSError(28, "No space left on device")

    node.gossip._persist = full
    await nursery.start(node.run)
    await node.until(lambda: node.gossip.leads == 1)
    assert any(
        record.levelno == logging.ERROR and "No space left" in record.message
        for record in caplog.records
    )


async def test_a_listener_may_update_the_record(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    a.gossip.on_event(lambda event: a.gossip.update(running=len(a.gossip.members)))
    await settle(a, b)
    await b.until(lambda: b.gossip.members["a"].record.running == 2)


async def test_listeners_hear_events_in_order_even_if_one_of_them_causes_more(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = Node(hub, "a", alone=True), Node(hub, "b")
    first: list[GossipEvent] = []
    second: list[GossipEvent] = []

    def listen_and_change(event: GossipEvent) -> None:
        first.append(event)
        a.gossip.update(running=len(a.gossip.members))

    a.gossip.on_event(listen_and_change)
    a.gossip.on_event(second.append)
    await nursery.start(a.run)
    await nursery.start(b.run)
    await settle(a, b)
    assert first == second


async def test_whoever_has_left_hears_nothing_any_more(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    await settle(a, b)
    await a.gossip.leave(5)
    for _ in range(3):
        b.network.cast("a", GOSSIP, Delta(news=News((signed(b.gossip.record),))))
    await trio.sleep(10)
    assert a.states()["a"] == "left"
    assert b.states()["a"] == "left"
