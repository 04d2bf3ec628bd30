"""The step scheduler against a model of the pipeline that checks every step it is given."""

import math
from collections import deque

import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.queue import OLDEST_EVERY
from pxd.engine.scheduler import NeverFits, QueueFull, Scheduler
from pxd.wire import SampledToken

from .pipeline import EOS, Pipeline, answer, request


def make(kv_tokens: int = 10_000, in_flight: int = 1, **options: object) -> Scheduler:
    config = ContinuousConfig(kv_tokens=kv_tokens, max_in_flight=in_flight, **options)  # type: ignore[arg-type]
    return Scheduler(Continuous(config))


def pool(scheduler: Scheduler):
    return scheduler.policy.pool  # type: ignore[attr-defined]


def drain(scheduler: Scheduler, pipeline: Pipeline) -> dict[int, list[int]]:
    """Run to the end with the oldest step finishing first; return each request's answer."""
    answers: dict[int, list[int]] = {}
    finished: dict[int, str] = {}
    flying: deque[tuple[int, list[SampledToken]]] = deque()
    while True:
        step = scheduler.next_step()
        if step is not None:
            flying.append((step.number, pipeline.run(step)))
            assert len(flying) <= scheduler.policy.max_in_flight
            continue
        if not flying:
            assert not scheduler.requests
            assert not pipeline.open
            assert set(finished) == set(answers)
            assert pool(scheduler).used == 0
            return answers
        for result in scheduler.step_done(*flying.popleft()):
            assert result.request not in finished
            answers.setdefault(result.request, []).extend(result.tokens)
            if result.finish:
                finished[result.request] = result.finish


def test_a_greeting_is_one_step_that_does_nothing() -> None:
    scheduler = make()
    assert scheduler.next_step() is None
    scheduler.greet()
    greeting = scheduler.next_step()
    assert greeting is not None
    assert (greeting.rows, greeting.openings, greeting.releases) == ((), (), ())
    scheduler.step_done(greeting.number, [])
    assert scheduler.next_step() is None


def test_the_last_prompt_token_is_a_decode() -> None:
    scheduler = make()
    scheduler.add(request(0, [1, 2, 3], 2))
    first = scheduler.next_step()
    assert first is not None
    assert [(r.position, r.count, r.draws) for r in first.rows] == [(0, 2, 0)]
    assert scheduler.next_step() is None, "one stage takes one step at a time"
    scheduler.step_done(first.number, [])
    second = scheduler.next_step()
    assert second is not None
    assert [(r.position, r.count, r.draws) for r in second.rows] == [(2, 1, 1)]
    assert second.tokens == (3,)


def test_long_prompts_are_chunked_and_other_requests_go_on() -> None:
    scheduler = make(in_flight=2, prefill_chunk=4, step_tokens=8)
    pipeline = Pipeline()
    scheduler.add(request(0, [1], 50))
    scheduler.add(request(1, range(20), 1))
    mixed = 0
    while 1 in scheduler.requests:
        step = scheduler.next_step()
        assert step is not None
        assert len(step.tokens) <= 8
        counts = {row.request: row.count for row in step.rows}
        mixed += counts.get(0) == 1 and counts.get(1, 0) > 1
        scheduler.step_done(step.number, pipeline.run(step))
    assert mixed >= 3


def test_prefills_share_the_budget_in_turns() -> None:
    scheduler = make(in_flight=4, prefill_chunk=8, step_tokens=8)
    scheduler.add(request(0, range(100), 1))
    scheduler.add(request(1, range(100), 1))
    steps = [scheduler.next_step() for _ in range(4)]
    assert [[row.request for row in step.rows] for step in steps if step] == [[0], [1], [0], [1]]


def test_prompts_take_little_of_a_step_while_somebody_waits_for_a_token() -> None:
    scheduler = make(step_tokens=100)
    scheduler.policy.mixed_tokens = 10  # type: ignore[attr-defined]
    scheduler.add(request(0, range(300), 9))
    first = scheduler.next_step()
    assert first is not None
    assert len(first.tokens) == 100
    scheduler.cancel(0)
    scheduler.step_done(first.number, [])
    scheduler.add(request(1, [1], 9))
    scheduler.add(request(2, range(300), 9))
    second = scheduler.next_step()
    assert second is not None
    assert [row.count for row in second.rows] == [1, 9]


def test_end_of_sequence_is_not_part_of_the_answer() -> None:
    scheduler = make()
    scheduler.add(request(3, [1, 2], 10, eos=frozenset({EOS})))
    assert drain(scheduler, Pipeline(ends={3: 4})) == {3: answer([1, 2], 2)}


def test_a_request_that_never_fits_is_refused_at_once() -> None:
    scheduler = make(kv_tokens=BLOCK_TOKENS * 2)
    with pytest.raises(NeverFits, match="129 tokens"):
        scheduler.add(request(0, [1] * 100, 29))
    scheduler.add(request(0, [1] * 100, 28))
    assert len(drain(scheduler, Pipeline())[0]) == 28


def test_a_request_without_tokens_or_room_is_a_mistake() -> None:
    for bad in (request(0, [], 1), request(0, [1], 0)):
        with pytest.raises(ValueError, match="at least one token"):
            make().add(bad)


def test_the_queue_is_bounded() -> None:
    config = ContinuousConfig(kv_tokens=1000)
    scheduler = Scheduler(Continuous(config), max_waiting=2)
    for number in range(2):
        scheduler.add(request(number, [1], 1))
    with pytest.raises(QueueFull):
        scheduler.add(request(2, [1], 1))
    assert scheduler.cancel(0)
    scheduler.add(request(2, [1], 1))
    assert scheduler.queued == [1, 2]


def test_decodes_are_spread_over_the_steps_in_flight() -> None:
    scheduler = make(in_flight=3)
    for number in range(6):
        scheduler.add(request(number, [1], 5))
    steps = [scheduler.next_step() for _ in range(3)]
    assert [len(step.rows) for step in steps if step] == [2, 2, 2]
    assert scheduler.next_step() is None


def test_a_failed_step_ends_its_requests_and_releases_them_everywhere() -> None:
    scheduler = make(in_flight=2)
    scheduler.add(request(0, [1], 5))
    scheduler.add(request(1, [1], 5))
    first, second = scheduler.next_step(), scheduler.next_step()
    assert first is not None
    assert second is not None
    assert scheduler.step_failed(first.number, also=[99]) == [0]
    assert scheduler.step_failed(first.number) == []
    after = scheduler.next_step()
    assert after is not None
    assert after.releases == (0,)
    assert scheduler.requests == [1]


def test_what_a_failed_request_has_left_is_not_used_again() -> None:
    scheduler, pipeline = make(), Pipeline()
    tokens = range(3 * BLOCK_TOKENS)
    scheduler.add(request(0, tokens, 9))
    step = scheduler.next_step()
    assert step is not None
    scheduler.step_done(step.number, pipeline.run(step))
    assert pool(scheduler).cached == 2
    step = scheduler.next_step()
    assert step is not None
    assert scheduler.step_failed(step.number) == [0]
    assert pool(scheduler).cached == 0


def test_releases_of_a_failed_step_are_not_lost() -> None:
    scheduler = make(in_flight=2)
    scheduler.add(request(0, [1], 5))
    first = scheduler.next_step()
    assert first is not None
    scheduler.cancel(0)
    scheduler.add(request(1, [1], 5))
    second = scheduler.next_step()
    assert second is not None
    assert second.releases == (0,)
    scheduler.step_failed(second.number)
    released = scheduler.next_step()
    assert released is None or released.releases == (1,)
    scheduler.step_done(first.number, [])
    scheduler.add(request(2, [1], 5))
    seen = set(released.releases) if released else set()
    while (step := scheduler.next_step()) is not None:
        seen.update(step.releases)
    assert seen == {0, 1}


def test_deadlines_end_requests_in_every_state() -> None:
    scheduler = make(max_running=1)
    scheduler.add(request(0, [1], 5, deadline=10.0))
    scheduler.add(request(1, [1], 5, deadline=5.0))
    scheduler.add(request(2, [1], 5))
    step = scheduler.next_step()
    assert step is not None
    assert scheduler.expire(4.9) == []
    assert scheduler.expire(5.0) == [1]
    assert scheduler.expire(20.0) == [0]
    assert scheduler.requests == [2]
    assert not scheduler.cancel(0)


def test_the_next_deadline_is_that_of_somebody_who_is_still_there() -> None:
    scheduler = make()
    assert scheduler.next_deadline == math.inf
    for number in range(500):
        scheduler.add(request(number, [1], 5, deadline=float(number)))
        if number % 5:
            scheduler.cancel(number)
    assert scheduler.next_deadline == 0.0
    assert scheduler.expire(250.0) == list(range(0, 251, 5))
    assert scheduler.next_deadline == 255.0
    for number in scheduler.requests:
        scheduler.cancel(number)
    assert scheduler.next_deadline == math.inf


def order_of_admission(scheduler: Scheduler) -> list[int]:
    """With one request at a time and one token for each."""
    pipeline, order = Pipeline(), []
    while (step := scheduler.next_step()) is not None:
        order += [row.request for row in step.rows if row.draws]
        scheduler.step_done(step.number, pipeline.run(step))
    return order


def test_priority_goes_first_but_starves_nobody() -> None:
    scheduler = make(max_running=1)
    scheduler.add(request(0, [1], 1))
    for number in range(1, 30):
        scheduler.add(request(number, [1], 1, priority=-5))
    order = order_of_admission(scheduler)
    assert order[0] == 1
    assert order.index(0) == OLDEST_EVERY - 1
    assert sorted(order) == list(range(30))


def test_sources_take_turns() -> None:
    scheduler = make(max_running=1)
    for number in range(20):
        scheduler.add(request(number, [1], 1, source="crowd"))
    for number in range(20, 23):
        scheduler.add(request(number, [1], 1, source="single"))
    order = order_of_admission(scheduler)
    assert [order.index(number) for number in (20, 21, 22)] <= [1, 4, 7]
    assert order[:1] == [0]


def test_urgency_does_not_shut_out_other_sources() -> None:
    """However much one source has queued before, and however urgent it says that it is."""
    scheduler = make(max_running=1)
    for number in range(400):
        scheduler.add(request(number, [1], 1, source="flood", priority=-10))
    for number in range(400, 410):
        scheduler.add(request(number, [1], 1, source="calm", priority=10))
    order = order_of_admission(scheduler)
    assert max(order.index(number) for number in range(400, 410)) < 40


def test_of_one_source_the_urgent_go_first_also_when_it_is_given_its_share() -> None:
    scheduler = make(max_running=1)
    for number in range(40):
        scheduler.add(request(number, [1], 1, source="one", priority=number % 2))
    for number in range(40, 80):
        scheduler.add(request(number, [1], 1, source="two"))
    order = order_of_admission(scheduler)
    urgent = [order.index(number) for number in range(0, 40, 2)]
    assert sum(urgent) < sum(order.index(number) for number in range(1, 40, 2))
    assert max(urgent) < 60


def test_clients_of_a_source_take_turns() -> None:
    scheduler = make(max_running=1)
    for number in range(20):
        scheduler.add(request(number, [1], 1, source="s", client="crowd"))
    for number in range(20, 23):
        scheduler.add(request(number, [1], 1, source="s", client="single"))
    order = order_of_admission(scheduler)
    assert max(order.index(number) for number in (20, 21, 22)) < 8


def test_a_source_is_not_given_more_for_having_many_clients() -> None:
    scheduler = make(max_running=1)
    for number in range(50):
        scheduler.add(request(number, [1], 1, source="many", client=f"c{number}"))
    for number in range(50, 60):
        scheduler.add(request(number, [1], 1, source="one", client="c"))
    order = order_of_admission(scheduler)
    assert max(order.index(number) for number in range(50, 60)) < 30


def test_urgent_requests_do_not_make_the_same_one_give_way_for_ever() -> None:
    """Before it has read its prompt again, somebody more urgent always needs its blocks."""
    scheduler = make(
        6 * BLOCK_TOKENS, admission="preempt", prefix_cache=False, prefill_chunk=1, step_tokens=64
    )
    pipeline = Pipeline(capacity=6)
    scheduler.add(request(0, [0] * 200, 1))
    finished: set[int] = set()
    urgent = 0
    for number in range(3000):
        if number % 37 == 0 and sum(other > 0 for other in scheduler.requests) < 2:
            urgent += 1
            scheduler.add(request(urgent, [urgent], 150, priority=-3))
        step = scheduler.next_step()
        assert step is not None
        results = scheduler.step_done(step.number, pipeline.run(step))
        finished |= {result.request for result in results if result.finish}
    assert 0 in finished
    assert len(finished) > 10


def test_a_common_prefix_is_computed_once() -> None:
    scheduler, pipeline = make(), Pipeline()
    common = list(range(1000, 1000 + 2 * BLOCK_TOKENS))
    scheduler.add(request(0, [*common, 1], 3))
    assert drain(scheduler, pipeline) == {0: answer([*common, 1], 3)}
    scheduler.add(request(1, [*common, 2], 3))
    first = scheduler.next_step()
    assert first is not None
    [opening] = first.openings
    assert (opening.cached, len(opening.hits)) == (2 * BLOCK_TOKENS, 2)
    assert [(row.position, row.draws) for row in first.rows] == [(2 * BLOCK_TOKENS, 1)]
    scheduler.step_done(first.number, pipeline.run(first))
    # The second one has taken the blocks over; a third one meanwhile gets copies.
    scheduler.add(request(2, [*common, 3], 3))
    answers = drain(scheduler, pipeline)
    assert answers[1] == answer([*common, 2], 3)[1:]
    assert answers[2] == answer([*common, 3], 3)
    assert pipeline.copied == 4 * BLOCK_TOKENS


def test_a_prompt_that_is_all_known_still_feeds_its_last_token() -> None:
    scheduler, pipeline = make(), Pipeline()
    tokens = list(range(2 * BLOCK_TOKENS))
    for number in range(2):
        scheduler.add(request(number, tokens, 2))
        assert drain(scheduler, pipeline)[number] == answer(tokens, 2)
    assert pipeline.copied == BLOCK_TOKENS


def test_shared_blocks_are_held_by_all_who_use_them() -> None:
    scheduler = make(storage="shared")
    common = list(range(2 * BLOCK_TOKENS))
    scheduler.add(request(0, [*common, 1], 30))
    for _ in range(2):
        step = scheduler.next_step()
        assert step is not None
        sampled = [SampledToken(0, len(common) + 1, 9)] if step.rows[0].draws else []
        scheduler.step_done(step.number, sampled)
    used = pool(scheduler).used
    scheduler.add(request(1, [*common, 2], 30))
    step = scheduler.next_step()
    assert step is not None
    [opening] = step.openings
    [grant] = [grant for grant in step.grants if grant.request == 1]
    assert grant.blocks[:2] == opening.hits
    assert pool(scheduler).used == used + 1
    scheduler.cancel(0)
    assert pool(scheduler).holders(opening.hits[0]) == 1


def test_when_blocks_run_out_the_latest_comer_makes_room_and_is_done_all_the_same() -> None:
    scheduler = make(6 * BLOCK_TOKENS, admission="preempt")
    pipeline = Pipeline(capacity=6)
    prompts = {number: [number] * BLOCK_TOKENS for number in range(3)}
    for number, tokens in prompts.items():
        scheduler.add(request(number, tokens, 4 * BLOCK_TOKENS))
    order: list[int] = []
    answers: dict[int, list[int]] = {number: [] for number in prompts}
    while (step := scheduler.next_step()) is not None:
        for result in scheduler.step_done(step.number, pipeline.run(step)):
            answers[result.request] += result.tokens
            order += [result.request] if result.finish else []
    assert order == [0, 1, 2]
    assert answers == {n: answer(tokens, 4 * BLOCK_TOKENS) for n, tokens in prompts.items()}


def test_a_hundred_thousand_tokens_and_ten_thousand_requests() -> None:
    scheduler, pipeline = make(kv_tokens=200_000), Pipeline()
    scheduler.add(request(0, range(100_000), 1))
    for number in range(1, 10_000):
        scheduler.add(request(number, [number], 1))
    assert len(drain(scheduler, pipeline)) == 10_000
