"""Gossip over the in-memory network, in virtual time (pytest-trio's autojump clock)."""

import itertools
import logging
from collections.abc import Callable

import msgspec
import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pxd.cluster.config import MembershipConfig
from pxd.cluster.leadership import LeaderChanged, TookOffice
from pxd.cluster.members import MemberEvent
from pxd.cluster.messages import MAX_RECORD, Delta, GossipMessage, News
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import seal
from pxd.p2p.gossip import GOSSIP, HAND_OVER_S, PERSIST_AGAIN_S, Gossip, GossipEvent
from pxd.p2p.network import CallFailed
from tests.memory_network import MemoryHub, MemoryNetwork
from tests.signers import FakeSigner, signed

LIMIT = 30.0


class Node:
    """A gossiping node on a hub, with what it persisted and what it told its listeners."""

    def __init__(
        self,
        hub: MemoryHub,
        name: str,
        *,
        alone: bool = False,
        incarnation: int = 1,
        term: int = 0,
        membership: MembershipConfig | None = None,
    ) -> None:
        self.network: MemoryNetwork = hub.network(name)
        record = NodeRecord(
            id=name, name=name, incarnation=incarnation, addresses=self.network.addresses()
        )
        self.persisted: list[tuple[int, int]] = []
        self.persist_delay = 0.0
        self.events: list[tuple[GossipEvent, int]] = []
        self.gossip = Gossip(
            self.network,
            record,
            signer=FakeSigner(name),
            seed=len(name),
            term=term,
            expects_peers=not alone,
            persist=self.persist,
            membership=membership,
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
    # The later term goes on, here as everywhere.
    await settle(c, a, b)
    await a.until(lambda: a.gossip.leads == 0)
    assert c.gossip.record.incarnation > 1
    assert c.persisted[-1][0] == c.gossip.record.incarnation
    assert a.kinds("c").count("joined") == 2
    assert a.gossip.term == c.gossip.leads


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


async def test_what_a_full_disk_refused_is_stored_once_there_is_room(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    node = Node(hub, "a", alone=True)
    tries: list[float] = []
    has_room = trio.Event()

    async def persist(incarnation: int, term: int) -> None:
        tries.append(trio.current_time())
        if not has_room.is_set():
            raise OSError(28, "No space left on device")
        await node.persist(incarnation, term)

    node.gossip._persist = persist
    await nursery.start(node.run)
    await node.until(lambda: node.gossip.leads == 1)
    await trio.sleep(600)
    pauses = [later - earlier for earlier, later in itertools.pairwise(tries)]
    assert pauses[: len(PERSIST_AGAIN_S)] == pytest.approx(list(PERSIST_AGAIN_S))
    assert max(pauses) == pytest.approx(PERSIST_AGAIN_S[-1]), "it is tried again, and not too often"
    has_room.set()
    await trio.sleep(PERSIST_AGAIN_S[-1])
    assert node.persisted == [(1, 1)]
    count = len(tries)
    await trio.sleep(600)
    assert len(tries) == count


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


def leaders(node: Node) -> list[str | None]:
    return [event.leader for event, _ in node.events if isinstance(event, LeaderChanged)]


async def test_the_lead_is_handed_over_before_the_goodbye(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b, c = await start(nursery, hub, "a", "b", "c")
    await settle(a, b, c)
    second = min((b, c), key=lambda node: (node.gossip.record.seniority, node.gossip.record.id))
    led_while_there: list[int] = []
    second.gossip.on_event(
        lambda event: (
            led_while_there.append(len([s for s in second.states().values() if s == "alive"]))
            if isinstance(event, TookOffice)
            else None
        )
    )
    before = trio.current_time()
    await a.gossip.leave(5)
    assert trio.current_time() - before < HAND_OVER_S
    assert second.gossip.leads == 2
    assert led_while_there == [3], "the one before was still there"
    assert [node.states()["a"] for node in (b, c)] == ["left", "left"]
    assert leaders(b)[-1] == leaders(c)[-1] == second.gossip.record.id


async def test_a_successor_that_does_not_take_over_is_not_waited_for_long(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    await settle(a, b)
    b.persist_delay = 100.0
    before = trio.current_time()
    await a.gossip.leave(5)
    assert trio.current_time() - before == pytest.approx(HAND_OVER_S)
    assert b.states()["a"] == "left"


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")])
async def test_nobody_waits_for_a_successor_that_is_not_needed(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub, names: tuple[str, ...]
) -> None:
    nodes = await start(nursery, hub, *names)
    await settle(*nodes)
    before = trio.current_time()
    await nodes[-1].gossip.leave(5)
    assert trio.current_time() - before < 0.1
    assert nodes[-1].states()[names[-1]] == "left"


async def test_a_change_of_priority_moves_the_lead_once(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b, c = await start(nursery, hub, "a", "b", "c")
    await settle(a, b, c)
    for node in (a, b, c):
        node.events.clear()
    c.gossip.update(priority=5)
    await c.until(lambda: c.gossip.leads == 2)
    await trio.sleep(30)
    assert [leaders(node) for node in (a, b, c)] == [["c"], ["c"], ["c"]]
    assert [node.gossip.leads for node in (a, b, c)] == [0, 0, 2]
    assert [node.gossip.term for node in (a, b, c)] == [2, 2, 2]
    assert c.persisted[-1] == (1, 2)


async def test_a_restarted_leader_is_believed_and_terms_go_on(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b, c = await start(nursery, hub, "a", "b", "c")
    await settle(a, b, c)
    a.gossip.update(priority=5)
    await b.until(lambda: b.gossip.members["a"].record.priority == 5)
    a.scope.cancel()
    await trio.testing.wait_all_tasks_blocked()
    again = Node(hub, "a", incarnation=2, term=a.persisted[-1][1])
    again.gossip.update(priority=5)
    await nursery.start(again.run)
    await again.until(lambda: again.gossip.leads > 0)
    await b.until(lambda: b.gossip.members["a"].record.leads == again.gossip.leads)
    for node in (again, b, c):
        await node.until(lambda node=node: node.gossip.term == again.gossip.leads)  # type: ignore[misc]
        assert node.gossip.leader == "a"
    assert again.gossip.leads >= 2
    assert b.states() == c.states() == {"a": "alive", "b": "alive", "c": "alive"}
    assert b.gossip.members["a"].record.incarnation >= 2
    assert b.kinds("a").count("died") == 0, "it is the same member"


async def test_what_forgers_send_is_logged_once_and_ignored(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    hub: MemoryHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    a, b, c = await start(nursery, hub, "a", "b", "c")
    await settle(a, b, c)
    record = msgspec.structs.replace(c.gossip.record, incarnation=9, memory=666)
    forged = Delta(news=News((seal(record, FakeSigner("b")),)))
    for _ in range(3):
        b.network.cast("a", GOSSIP, forged)
    await trio.sleep(1)
    assert a.gossip.members["c"].record == c.gossip.record
    (line,) = [r for r in caplog.records if "not signed" in r.message]
    assert line.levelno == logging.WARNING
    assert line.message.startswith("b passes on news of c")


async def test_a_full_cluster_is_told_of_once_a_minute(
    autojump_clock: MockClock,
    nursery: trio.Nursery,
    hub: MemoryHub,
    caplog: pytest.LogCaptureFixture,
) -> None:
    a = Node(hub, "a", alone=True, membership=MembershipConfig(max_members=2))
    b = Node(hub, "b")
    for node in (a, b):
        await nursery.start(node.run)
    await settle(a, b)
    for second in range(90):
        stranger = NodeRecord(id=f"x{second}", name="x", incarnation=1)
        b.network.cast("a", GOSSIP, Delta(news=News((signed(stranger),))))
        await trio.sleep(1)
    assert set(a.states()) == {"a", "b"}
    assert len([r for r in caplog.records if "greatest size" in r.message]) == 2


async def test_messages_beyond_the_size_of_gossip_are_refused_undecoded(
    autojump_clock: MockClock, nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    await settle(a, b)
    content = signed(NodeRecord(id="x", name="x", incarnation=1))
    padded = msgspec.structs.replace(content, content=bytes(MAX_RECORD))
    with pytest.raises(CallFailed) as failure:
        await b.network.call("a", GOSSIP, Delta(news=News((padded,) * 3)), timeout=5)
    assert failure.value.code == "too-large"
