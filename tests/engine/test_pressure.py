"""Steps that a stage has no memory for are tried again in smaller ones."""

import pytest

from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.pressure import EASE_STEPS, LEAST_POSITIONS, Pressure
from pxd.engine.scheduler import PlannedStep, Scheduler

from .pipeline import Pipeline, answer, request


def make_scheduler(**options: int) -> Scheduler:
    return Scheduler(Continuous(ContinuousConfig(kv_tokens=1 << 14, **options)))


class Cramped:
    """A pipeline whose stages have memory for steps of `most` positions and `crowd` requests."""

    def __init__(self, most: int, crowd: int = 1000) -> None:
        self.most, self.crowd = most, crowd
        self.pipeline = Pipeline()
        self.answers: dict[int, list[int]] = {}
        self.failed: list[int] = []
        self.refused: list[PlannedStep] = []

    def has_room(self, step: PlannedStep, scheduler: Scheduler) -> bool:
        return len(step.tokens) <= self.most and scheduler.running <= self.crowd

    def run(self, scheduler: Scheduler) -> None:
        while (step := scheduler.next_step()) is not None:
            sampled = self.pipeline.run(step)
            if not self.has_room(step, scheduler):
                self.refused.append(step)
                self.failed += scheduler.step_failed(step.number, starved=True)
                continue
            for result in scheduler.step_done(step.number, sampled):
                self.answers.setdefault(result.request, []).extend(result.tokens)


def test_prompts_are_cut_shorter_first_and_then_fewer_run() -> None:
    pressure = Pressure(4096, 256)
    seen = []
    positions, running = 4096, 8
    while pressure.shrink(positions, running):
        seen.append((pressure.positions, pressure.running))
        positions, running = min(positions, pressure.positions), min(running, pressure.running)
    assert seen == [
        (1024, 256),
        (256, 256),
        (64, 256),
        (LEAST_POSITIONS, 256),
        (LEAST_POSITIONS, 4),
        (LEAST_POSITIONS, 2),
        (LEAST_POSITIONS, 1),
    ]


def test_steps_in_flight_that_fail_for_the_same_want_shrink_once() -> None:
    pressure = Pressure(4096, 256)
    assert pressure.shrink(4096, 8)
    assert pressure.shrink(4096, 8)
    assert pressure.positions == 1024


def test_more_is_tried_after_a_while_that_grows() -> None:
    pressure = Pressure(4096, 256)
    pressure.shrink(4096, 8)
    waits = []
    for _ in range(3):
        steps = 0
        while pressure.positions < 4096:
            pressure.ease()
            steps += 1
        waits.append(steps)
        pressure.shrink(4096, 8)
    assert waits == [4 * EASE_STEPS, 8 * EASE_STEPS, 16 * EASE_STEPS]


@pytest.mark.parametrize("flights", [1, 3])
def test_nobody_is_lost_and_every_answer_is_right(flights: int) -> None:
    scheduler, cramped = make_scheduler(max_in_flight=flights), Cramped(70)
    prompts = {number: [number + 1] * (40 + 37 * number) for number in range(8)}
    for number, tokens in prompts.items():
        scheduler.add(request(number, tokens, 12))
    cramped.run(scheduler)
    assert cramped.failed == []
    assert cramped.answers == {n: answer(tokens, 12) for n, tokens in prompts.items()}
    assert scheduler.policy.pool.used == 0
    assert len(cramped.refused) < 6


def test_fewer_run_at_once_where_shorter_prompts_do_not_help() -> None:
    scheduler, cramped = make_scheduler(), Cramped(4096, crowd=3)
    prompts = {number: [number + 1] * 30 for number in range(10)}
    for number, tokens in prompts.items():
        scheduler.add(request(number, tokens, 12))
    cramped.run(scheduler)
    assert cramped.failed == []
    assert cramped.answers == {n: answer(tokens, 12) for n, tokens in prompts.items()}


def test_who_has_no_room_at_all_fails_and_the_others_do_not() -> None:
    scheduler, cramped = make_scheduler(), Cramped(4096)
    prompts = {number: [number + 1] * 30 for number in range(4)}
    for number, tokens in prompts.items():
        scheduler.add(request(number, tokens, 12))
    cramped.has_room = lambda step, _: all(row.request != 2 for row in step.rows)  # type: ignore[method-assign]
    cramped.run(scheduler)
    assert cramped.failed == [2]
    assert cramped.answers == {n: answer(tokens, 12) for n, tokens in prompts.items() if n != 2}
    assert scheduler.policy.pool.used == 0


def test_nothing_new_is_sent_before_all_that_is_in_flight_is_back() -> None:
    scheduler = make_scheduler(max_in_flight=3, step_tokens=100, prefill_chunk=100)
    pipeline = Pipeline()
    scheduler.add(request(1, [3] * 290, 4))
    steps = [scheduler.next_step() for _ in range(3)]
    assert all(step is not None and step.rows[0].request == 1 for step in steps)
    results = [pipeline.run(step) for step in steps if step is not None]
    assert scheduler.step_done(0, results[0]) == []
    assert scheduler.step_failed(1, starved=True) == []
    assert scheduler.next_step() is None
    # The stage does not know the request any more: that is no failure of its own.
    assert scheduler.step_failed(2, (1,)) == []
    again = scheduler.next_step()
    assert again is not None
    assert again.releases == (1,)
    assert [opening.request for opening in again.openings] == [1]
    assert len(again.tokens) == 25
