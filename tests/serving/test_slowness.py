"""A stage that falls behind its own figures, and a node that is known for it."""

from collections.abc import Callable
from itertools import pairwise

from hypothesis import given
from hypothesis import strategies as st

from pxd.serving.slowness import (
    AFTER_S,
    HOLDS_S,
    SOUND_AFTER_S,
    WINDOW_S,
    Slowness,
    SlowNode,
)
from pxd.wire import Row

DECODE = (Row(1, 100, 1, 1),)
X, Y = ("m", "f", 0, 4), ("m", "f", 4, 8)


class Stage:
    """Runs decode steps of `usual` seconds with `idle` seconds between them."""

    def __init__(self, usual: float = 0.05, idle: float = 0.0) -> None:
        self.slowness = Slowness()
        self.usual, self.idle = usual, idle
        self.now = 1000.0
        self.ordinary: list[bool] = []

    def step(self, seconds: float, rows: tuple[Row, ...] = DECODE) -> None:
        self.now += seconds
        self.ordinary.append(self.slowness.add(rows, seconds, self.now))
        self.now += self.idle

    def work(self, seconds: float, factor: float = 1.0) -> None:
        end = self.now + seconds
        while self.now < end:
            self.step(self.usual * factor)

    def seconds_until(self, condition: Callable[[], bool], factor: float) -> float:
        began = self.now
        while not condition():
            self.step(self.usual * factor)
            assert self.now < began + 600
        return self.now - began


def test_three_times_slower_for_a_while_is_slow() -> None:
    stage = Stage()
    stage.work(60)
    assert stage.slowness.factor == 0
    took = stage.seconds_until(lambda: stage.slowness.factor > 0, 4.0)
    assert AFTER_S - WINDOW_S <= took <= AFTER_S + 2 * WINDOW_S
    assert 3.5 < stage.slowness.factor <= 4.0


def test_twice_as_slow_is_not() -> None:
    stage = Stage()
    stage.work(60)
    stage.work(600, 2.0)
    assert stage.slowness.factor == 0


def test_it_is_well_again_only_when_it_is_nearly_as_fast_as_before() -> None:
    stage = Stage()
    stage.work(60)
    stage.work(60, 5.0)
    stage.work(600, 2.0)
    assert stage.slowness.factor >= 3
    took = stage.seconds_until(lambda: stage.slowness.factor == 0, 1.1)
    assert took >= AFTER_S - WINDOW_S


def test_nobody_gets_used_to_being_slow() -> None:
    stage = Stage()
    stage.work(60)
    stage.work(24 * 3600, 20.0)
    assert stage.slowness.factor > 3
    assert not any(stage.ordinary[-1000:])
    stage.seconds_until(lambda: stage.slowness.factor == 0, 1.0)


def test_a_pause_is_not_slowness_however_long() -> None:
    stage = Stage()
    stage.work(60)
    for pause in (5.0, 25.0, 300.0):
        stage.step(pause)
        stage.work(30)
        assert stage.slowness.factor == 0


def test_an_idle_stage_is_judged_by_its_steps_alone() -> None:
    stage = Stage(idle=3.0)
    stage.work(300)
    stage.work(300, 1.2)
    assert stage.slowness.factor == 0
    stage.work(120, 6.0)
    assert stage.slowness.factor > 3


def test_slow_steps_long_ago_say_nothing_about_now() -> None:
    stage = Stage()
    stage.work(60)
    for _ in range(20):
        stage.work(12, 4.0)
        stage.now += 3600
    assert stage.slowness.factor == 0


def test_larger_steps_and_longer_contexts_are_compared_with_their_like() -> None:
    stage = Stage()
    stage.work(60)
    for position in range(0, 200_000, 2000):
        for _ in range(10):
            stage.step(0.05 + position / 40_000, (Row(1, position, 1, 1),))
            stage.step(2.0, (Row(1, position, 2048, 0),))
    assert stage.slowness.factor == 0
    assert all(stage.ordinary)


Period = tuple[float, float]


@given(st.lists(st.tuples(st.floats(1, 90), st.floats(0.5, 8)), max_size=25))
def test_it_changes_at_most_once_in_a_while(periods: list[Period]) -> None:
    stage = Stage(usual=0.25)
    stage.work(60)
    changes = []
    before = 0.0
    for seconds, factor in periods:
        end = stage.now + seconds
        while stage.now < end:
            stage.step(stage.usual * factor)
            if (stage.slowness.factor > 0) != (before > 0):
                changes.append(stage.now)
            before = stage.slowness.factor
            assert before == 0 or before >= 3
    assert all(later - earlier >= AFTER_S for earlier, later in pairwise(changes))


def test_a_node_is_remembered_when_its_stage_was_taken_away() -> None:
    node = SlowNode()
    assert node.update({X: 0.0}, 0.0) == 0
    assert node.update({X: 4.0, Y: 0.0}, 1.0) == 4
    assert node.update({Y: 0.0}, 2.0) == 4
    assert node.update({Y: 0.0}, 2.0 + HOLDS_S[0] - 1) == 4
    assert node.update({Y: 0.0}, 2.0 + HOLDS_S[0]) == 0


def test_a_stage_that_is_well_again_clears_it_at_once() -> None:
    node = SlowNode()
    assert node.update({X: 4.0}, 1.0) == 4
    assert node.update({X: 0.0}, 2.0) == 0


def test_it_is_remembered_for_longer_each_time() -> None:
    node, now, holds = SlowNode(), 0.0, []
    for _ in range(4):
        node.update({X: 3.0}, now)
        began = now
        while node.update({}, now):
            now += 10.0
        holds.append(now - began)
    assert holds == [*HOLDS_S, HOLDS_S[-1]]
    now += SOUND_AFTER_S + 1
    node.update({X: 3.0}, now)
    node.update({}, now)
    assert node.update({}, now + HOLDS_S[0]) == 0


@given(
    st.lists(
        st.tuples(
            st.floats(1, 300), st.dictionaries(st.sampled_from([X, Y]), st.sampled_from([0.0, 4.0]))
        ),
        max_size=200,
    )
)
def test_a_node_whose_stages_come_and_go_is_taken_back_seldom(
    events: list[tuple[float, dict[str, float]]],
) -> None:
    """Taken back is who lost its stages while slow, and counts as well again without proof."""
    node, now, taken_back = SlowNode(), 0.0, 0
    before = 0.0
    for seconds, factors in events:
        now += seconds
        factor = node.update(factors, now)
        taken_back += before > 0 and not factor and not factors
        before = factor
    assert taken_back <= now / HOLDS_S[0]
