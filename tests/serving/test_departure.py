"""A node that leaves waits for others, if anybody can take over, and not for too long."""

from collections.abc import Callable

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pxd.serving.clients import Clients
from pxd.serving.departure import CLIENTS_GRACE_S, Departure, handing_over
from pxd.serving.handover import LEAVE_GRACE_S
from pxd.serving.requests import NotReady

from .leader import GIB, Leader, Models, description, nodes

LIMIT = 20.0


class Record:
    """Node b's own."""

    def __init__(self, leader: Leader) -> None:
        self._leader = leader

    def update(self, **changes: object) -> None:
        self._leader.record("b", **changes)


class Leaver:
    """Node b, of which a is the leader."""

    def __init__(self, leader: Leader) -> None:
        self.leader = leader
        self.clients = Clients(leader.changed.notify)
        self.departure = Departure(
            "b",
            LIMIT,
            Record(leader),
            lambda: leader.plan,
            lambda: leader.cluster.members,
            self.clients,
        )

    async def leave(self, *events: tuple[float, Callable[[], object]]) -> float:
        """How long it takes, while things happen at the given times."""
        began = trio.current_time()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self.leader.planner.run, self.leader.changed)
            for at, event in events:
                nursery.start_soon(self._later, began + at, event)
            await self.departure.prepare(self.leader.changed)
            took = trio.current_time() - began
            nursery.cancel_scope.cancel()
        return took

    async def _later(self, at: float, event: Callable[[], object]) -> None:
        await trio.sleep_until(at)
        event()
        self.leader.changed.notify()

    def words(self) -> str:
        return self.departure.waits_for


async def serving(answer: Callable[[], object] = description, **memory_gib: float) -> Leaver:
    leader = Leader(Models(answer), **memory_gib)  # type: ignore[arg-type]
    await leader.run_for(30)
    leader.obey()
    await leader.run_for(30)
    return Leaver(leader)


async def replaced_by_c() -> Leaver:
    """Only b serves, and c could."""
    b = await serving(lambda: description(layers=6, layer_bytes=GIB // 4), a=0.1, b=3)
    b.leader.add("c", 3)
    b.leader.record("c", drained=True)
    await b.leader.run_for(10)
    b.leader.record("c", drained=False)
    assert nodes(b.leader.model().pipelines) == [["b"]]
    return b


async def test_it_goes_once_others_serve_and_its_requests_have_ended(clock: MockClock) -> None:
    b = await replaced_by_c()
    leader, said = b.leader, []

    def say() -> None:
        said.append((b.words(), nodes(leader.model().pipelines), nodes(leader.model().retiring)))

    needed = handing_over("b", leader.plan, leader.cluster.members)
    assert needed == "a plan for sums without this node"
    took = await b.leave(
        (3, lambda: leader.obey("loading")),
        (5, say),
        (6, lambda: leader.obey(b=2)),
        (9, say),
        (10, lambda: leader.obey(b=0)),
    )
    assert said == [
        ("others to load sums", [["c"]], [["b"]]),
        ("requests for sums to end or to move", [["c"]], [["b"]]),
    ]
    assert 10 <= took < 13
    assert nodes(leader.model().all_pipelines) == [["c"]]


async def test_requests_that_do_not_end_are_moved(clock: MockClock) -> None:
    b = await serving(a=16, b=16)
    took = await b.leave((3, lambda: b.leader.obey(b=2)))
    assert LEAVE_GRACE_S < took < LEAVE_GRACE_S + 5
    assert nodes(b.leader.model().all_pipelines) == [["a"]]


async def test_it_waits_no_longer_than_it_was_told(clock: MockClock) -> None:
    b = await replaced_by_c()
    assert await b.leave((3, lambda: b.leader.obey("loading"))) == pytest.approx(LIMIT)


async def test_it_can_be_told_to_wait_for_nothing_any_more(clock: MockClock) -> None:
    b = await replaced_by_c()
    loading = (3, lambda: b.leader.obey("loading"))
    assert await b.leave(loading, (7, b.departure.hurry)) == pytest.approx(7)
    again = await replaced_by_c()
    again.departure.hurry()
    assert await again.leave() == 0


async def test_nobody_can_take_over(clock: MockClock) -> None:
    """The plan has to say so first."""
    b = await serving(a=8, b=8)
    assert [sorted(line) for line in nodes(b.leader.model().pipelines)] == [["a", "b"]]
    assert await b.leave() < 3
    assert b.leader.model().state == "waiting"


async def test_all_leave(clock: MockClock) -> None:
    b = await serving(a=16, b=16)
    b.leader.record("a", leaving=True)
    assert await b.leave() == 0
    late = await replaced_by_c()
    for name in "ac":
        late.leader.record(name, leaving=name == "a")
    assert await late.leave((2, lambda: late.leader.record("c", leaving=True))) == pytest.approx(2)


async def test_there_is_nothing_to_hand_over(clock: MockClock) -> None:
    alone = await serving(a=0.1, b=16)
    alone.leader.cluster.members["a"].state = "left"
    assert await alone.leave() == 0
    idle = await serving(a=16, b=0.1)
    assert nodes(idle.leader.model().pipelines) == [["a"]]
    assert await idle.leave() == 0


class Asking:
    """A request of a client of b, from `since` on and for `seconds`."""

    def __init__(self, b: Leaver, since: float, seconds: float = float("inf")) -> None:
        self.told: NotReady | None = None
        self._clients = b.clients
        self._since, self._seconds = since, seconds

    async def run(self) -> None:
        await trio.sleep(self._since)
        try:
            with self._clients.request(), trio.move_on_after(self._seconds):
                self.told = await self._clients.wait_over()
        except NotReady as error:
            self.told = error


async def asked(b: Leaver, *requests: Asking) -> float:
    async with trio.open_nursery() as nursery:
        for request in requests:
            nursery.start_soon(request.run)
        await trio.testing.wait_all_tasks_blocked()
        return await b.leave((3, lambda: b.leader.obey(b=0)))


async def test_its_own_clients_have_their_answers(clock: MockClock) -> None:
    """New requests are taken until the others serve."""
    b = await serving(a=16, b=16)
    served, early, late = Asking(b, 0, 9), Asking(b, 2, 3), Asking(b, 7, 1)
    assert await asked(b, served, early, late) == pytest.approx(9)
    assert (served.told, early.told) == (None, None)
    assert late.told is not None
    assert late.told.retry_after > 0


async def test_clients_that_take_too_long_are_told(clock: MockClock) -> None:
    b = await serving(a=16, b=16)
    endless = Asking(b, 0)
    assert await asked(b, endless) == pytest.approx(LIMIT)
    assert "leaving" in str(endless.told)


async def test_without_anybody_else_clients_have_a_moment(clock: MockClock) -> None:
    b = await serving(a=0.1, b=16)
    b.leader.cluster.members["a"].state = "dead"
    endless = Asking(b, 0)
    assert await asked(b, endless) == pytest.approx(CLIENTS_GRACE_S)
    assert endless.told is not None
