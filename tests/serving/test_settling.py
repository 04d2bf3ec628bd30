"""Plans wait until nodes have come and gone, but not where nothing is served any more."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from pxd.serving.settling import LONGEST_S, QUIET_S, STRANDED_S, Settling

from .leader import Leader, Models, description, nodes

looks = st.lists(st.tuples(st.floats(0.01, 2), st.integers(0, 2), st.booleans()), max_size=40)


def test_a_burst_is_over_after_a_quiet_second() -> None:
    settling = Settling(10.0, "view")
    assert settling.rest(10.0, "view", stranded=False) == QUIET_S
    assert settling.rest(10.4, "view", stranded=False) == pytest.approx(QUIET_S - 0.4)
    assert settling.rest(10.9, "another", stranded=False) == QUIET_S
    assert settling.rest(11.5, "view", stranded=False) == QUIET_S
    assert settling.rest(12.5, "view", stranded=False) == 0


def test_where_nothing_is_served_only_others_that_die_with_it_are_waited_for() -> None:
    settling = Settling(10.0, "view")
    assert settling.rest(10.8, "fewer", stranded=True) == pytest.approx(STRANDED_S)
    assert settling.rest(11.0, "still fewer", stranded=True) == pytest.approx(STRANDED_S - 0.2)
    assert settling.rest(11.2, "still fewer", stranded=False) == 0


@given(looks)
def test_a_plan_is_made_in_time_and_never_in_the_middle(
    looks: list[tuple[float, int, bool]],
) -> None:
    settling, now, view = Settling(0.0, 0), 0.0, 0
    changed, stranded_at = 0.0, float("inf")
    for after, next_view, stranded in looks:
        now += after
        changed, view = (now, next_view) if next_view != view else (changed, view)
        stranded_at = min(stranded_at, now) if stranded else stranded_at
        rest = settling.rest(now, view, stranded=stranded)
        due = min(changed + QUIET_S, LONGEST_S, stranded_at + STRANDED_S)
        assert rest == pytest.approx(max(0.0, due - now))


@asynccontextmanager
async def leading(leader: Leader) -> AsyncIterator[None]:
    async with trio.open_nursery() as nursery:
        nursery.start_soon(leader.planner.run, leader.changed)
        yield
        nursery.cancel_scope.cancel()


def join(leader: Leader, name: str, gib: float, max_layers: int | None = None) -> None:
    leader.add(name, gib)
    leader.record(name, max_layers=max_layers)


def die(leader: Leader, name: str) -> None:
    leader.cluster.members[name].state = "dead"
    leader.changed.notify()


async def seconds_until_planned(leader: Leader) -> float:
    began, count = trio.current_time(), len(leader.plans)
    with trio.fail_after(60):
        while len(leader.plans) == count:
            await trio.sleep(0.05)
    return trio.current_time() - began


def serving(leader: Leader) -> list[list[str]]:
    return sorted(sorted(chain) for chain in nodes(leader.model().pipelines))


async def test_nodes_that_join_one_after_the_other_are_planned_together(clock: MockClock) -> None:
    leader = Leader(Models(description), a=2)
    async with leading(leader):
        await trio.sleep(10)
        assert leader.model().state == "waiting"
        for name in "bcd":
            join(leader, name, 8)
            await trio.sleep(0.8)
        assert QUIET_S - 0.8 <= await seconds_until_planned(leader) <= QUIET_S
        await trio.sleep(60)
        assert len(leader.plans) == 2
        assert len(serving(leader)) == 2


async def test_a_view_that_never_rests_is_planned_for_all_the_same(clock: MockClock) -> None:
    leader = Leader(Models(description), a=2)
    async with leading(leader):
        await trio.sleep(10)
        for number in range(8):
            join(leader, f"n{number}", 8)
            await trio.sleep(0.6)
        assert len(leader.plans) == 2


async def test_a_death_that_leaves_nothing_served_is_planned_around_at_once(
    clock: MockClock,
) -> None:
    leader = Leader(Models(description), a=8, b=8, c=8)
    async with leading(leader):
        await trio.sleep(10)
        leader.obey()
        await trio.sleep(10)
        die(leader, "b")
        assert await seconds_until_planned(leader) <= 0.5
        assert serving(leader) == [["a", "c"]]
        # The same in the middle of a burst.
        leader.obey()
        await trio.sleep(10)
        join(leader, "d", 8)
        await trio.sleep(0.5)
        die(leader, "c")
        assert await seconds_until_planned(leader) <= 0.5
        assert serving(leader) == [["a", "d"]]


async def test_while_another_pipeline_serves_there_is_time(clock: MockClock) -> None:
    leader = Leader(Models(description), a=16, b=16)
    async with leading(leader):
        await trio.sleep(10)
        leader.obey()
        await trio.sleep(10)
        die(leader, "b")
        assert await seconds_until_planned(leader) >= QUIET_S


async def test_a_lone_chain_is_loaded_first_then_two_pipelines_follow_it(clock: MockClock) -> None:
    leader = Leader(Models(description), a=24)
    async with leading(leader):
        await trio.sleep(10)
        leader.obey()
        join(leader, "b", 24, max_layers=5)
        await trio.sleep(10)
        assert serving(leader) == [["a", "b"]]
        leader.obey("loading")
        join(leader, "c", 24, max_layers=5)
        await trio.sleep(10)
        assert serving(leader) == [["a", "b"]]
        leader.obey()
        await trio.sleep(10)
        assert serving(leader) == [["a"], ["b", "c"]]
        assert nodes(leader.model().retiring) == [["b", "a"]]
        leader.obey("ready", b=0)
        await trio.sleep(10)
        assert leader.model().retiring == ()
        count = len(leader.plans)
        await trio.sleep(600)
        assert len(leader.plans) == count
