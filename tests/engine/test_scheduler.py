"""The step scheduler against a model of the pipeline that checks every step it is given."""

from collections import deque

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.engine.blocks import BLOCK_TOKENS, BlockPool
from pxd.engine.scheduler import NeverFits, PlannedStep, Scheduler, SchedulerConfig
from pxd.wire import SampledToken, Sampling

GREEDY = Sampling(temperature=0)
EOS = 7


def make(kv_tokens: int = 10_000, in_flight: int = 1, **options: int) -> Scheduler:
    return Scheduler(SchedulerConfig(kv_tokens=kv_tokens, max_in_flight=in_flight, **options))


class Pipeline:
    """Runs steps in order as a stage would, and insists on gapless positions and known requests.

    The next token of a request is its position + 100, or EOS where `ends` says so.
    """

    def __init__(self, ends: dict[int, int] | None = None) -> None:
        self.caches: dict[int, list[int]] = {}
        self.ends = ends or {}

    def run(self, step: PlannedStep) -> list[SampledToken]:
        for request in step.releases:
            del self.caches[request]
        for opening in step.openings:
            assert opening.request not in self.caches
            self.caches[opening.request] = []
        assert sum(row.count for row in step.rows) == len(step.tokens)
        sampled, offset = [], 0
        for row in step.rows:
            cache = self.caches[row.request]
            assert row.position == len(cache)
            assert row.count == 1 or not row.sample
            cache.extend(step.tokens[offset : offset + row.count])
            offset += row.count
            if row.sample:
                ends = self.ends.get(row.request) == len(cache)
                token = EOS if ends else len(cache) + 100
                sampled.append(SampledToken(row.request, len(cache), token))
        return sampled


def drain(scheduler: Scheduler, pipeline: Pipeline) -> dict[int, list[int]]:
    """Run to the end with the oldest step finishing first; return each request's answer."""
    answers: dict[int, list[int]] = {}
    finished: dict[int, str] = {}
    flying: deque[tuple[int, list[SampledToken]]] = deque()
    while True:
        step = scheduler.next_step()
        if step is not None:
            flying.append((step.number, pipeline.run(step)))
            assert len(flying) <= scheduler.config.max_in_flight
            continue
        if not flying:
            assert not scheduler.requests
            assert not pipeline.caches
            assert set(finished) == set(answers)
            return answers
        for result in scheduler.step_done(*flying.popleft()):
            assert result.request not in finished
            answers.setdefault(result.request, []).extend(result.tokens)
            if result.finish:
                finished[result.request] = result.finish


def test_the_last_prompt_token_is_a_decode() -> None:
    scheduler = make()
    scheduler.add(0, [1, 2, 3], 2, GREEDY, frozenset())
    first = scheduler.next_step()
    assert first is not None
    assert [(r.position, r.count, r.sample) for r in first.rows] == [(0, 2, False)]
    assert scheduler.next_step() is None, "one stage takes one step at a time"
    scheduler.step_done(first.number, [])
    second = scheduler.next_step()
    assert second is not None
    assert [(r.position, r.count, r.sample) for r in second.rows] == [(2, 1, True)]
    assert second.tokens == (3,)


def test_long_prompts_are_chunked_and_other_requests_go_on() -> None:
    scheduler = make(in_flight=2, prefill_chunk=4, step_tokens=8)
    pipeline = Pipeline()
    scheduler.add(0, [1], 50, GREEDY, frozenset())
    scheduler.add(1, list(range(20)), 1, GREEDY, frozenset())
    mixed = 0
    while 1 in scheduler.requests:
        step = scheduler.next_step()
        assert step is not None
        assert len(step.tokens) <= 8
        counts = {row.request: row.count for row in step.rows}
        mixed += counts.get(0) == 1 and counts.get(1, 0) > 1
        scheduler.step_done(step.number, pipeline.run(step))
    assert mixed >= 3


def test_end_of_sequence_is_not_part_of_the_answer() -> None:
    scheduler = make()
    scheduler.add(3, [1, 2], 10, GREEDY, frozenset({EOS}))
    assert drain(scheduler, Pipeline(ends={3: 4})) == {3: [102, 103]}


def test_a_request_that_never_fits_is_refused_at_once() -> None:
    scheduler = make(kv_tokens=BLOCK_TOKENS * 2)
    with pytest.raises(NeverFits, match="129 tokens"):
        scheduler.add(0, [1] * 100, 29, GREEDY, frozenset())
    scheduler.add(0, [1] * 100, 28, GREEDY, frozenset())
    assert len(drain(scheduler, Pipeline())[0]) == 28


def test_decodes_are_spread_over_the_steps_in_flight() -> None:
    scheduler = make(in_flight=3)
    for number in range(6):
        scheduler.add(number, [1], 5, GREEDY, frozenset())
    steps = [scheduler.next_step() for _ in range(3)]
    assert [len(step.rows) for step in steps if step] == [2, 2, 2]
    assert scheduler.next_step() is None


def test_a_failed_step_ends_its_requests_and_releases_them_everywhere() -> None:
    scheduler = make(in_flight=2)
    scheduler.add(0, [1], 5, GREEDY, frozenset())
    scheduler.add(1, [1], 5, GREEDY, frozenset())
    first, second = scheduler.next_step(), scheduler.next_step()
    assert first is not None
    assert second is not None
    assert scheduler.step_failed(first.number, also=[99]) == [0]
    assert scheduler.step_failed(first.number) == []
    after = scheduler.next_step()
    assert after is not None
    assert after.releases == (0,)
    assert scheduler.requests == [1]


@settings(max_examples=200, deadline=None)
@given(
    st.lists(
        st.tuples(
            st.integers(1, 300),
            st.integers(1, 40),
            st.none() | st.integers(0, 30),
            st.none() | st.integers(0, 60),
        ),
        min_size=1,
        max_size=12,
    ),
    st.integers(1, 4),
    st.integers(6, 40),
    st.randoms(use_true_random=False),
)
def test_every_request_ends_once_and_right(requests, in_flight, blocks, random) -> None:
    """Requests: (prompt length, max new, EOS after n tokens, cancelled at event n)."""
    scheduler = make(blocks * BLOCK_TOKENS, in_flight, max_running=5, prefill_chunk=64)
    pipeline = Pipeline({n: r[0] + r[2] for n, r in enumerate(requests) if r[2] is not None})
    answers: dict[int, list[int]] = {n: [] for n in range(len(requests))}
    ended: dict[int, str] = {}
    flying: deque[tuple[int, list[SampledToken]]] = deque()
    for number, (prompt, new, _, _) in enumerate(requests):
        scheduler.add(number, range(prompt), new, GREEDY, frozenset({EOS}))
    events = 0
    while len(ended) < len(requests) or flying or pipeline.caches:
        for number, request in enumerate(requests):
            if request[3] == events and number not in ended:
                assert scheduler.cancel(number)
                ended[number] = "cancelled"
        events += 1
        step = scheduler.next_step() if random.random() < 0.6 else None
        if step is not None:
            flying.append((step.number, pipeline.run(step)))
        elif flying:
            for result in scheduler.step_done(*flying.popleft()):
                answers[result.request].extend(result.tokens)
                if result.finish:
                    assert result.request not in ended
                    ended[result.request] = result.finish
        assert events < 50_000
    for number, (prompt, new, eos, _) in enumerate(requests):
        stops = eos is not None and eos < new
        expected = [prompt + i + 100 for i in range(eos if stops else new)]
        if ended[number] == "cancelled":
            assert answers[number] == expected[: len(answers[number])]
        else:
            assert ended[number] == ("stop" if stops else "length")
            assert answers[number] == expected
    assert scheduler.free_blocks == blocks
    assert not scheduler.requests


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(1, 500)), max_size=40))
def test_the_pool_never_gives_more_than_it_has(operations: list[tuple[int, int]]) -> None:
    pool = BlockPool(20 * BLOCK_TOKENS)
    held: dict[int, int] = {}
    for request, tokens in operations:
        if request in held:
            pool.release(request)
            del held[request]
        elif pool.reserve(request, tokens):
            held[request] = -(-tokens // BLOCK_TOKENS)
        assert pool.used == sum(held.values()) <= pool.capacity


def test_releases_of_a_failed_step_are_not_lost() -> None:
    scheduler = make(in_flight=2)
    scheduler.add(0, [1], 5, GREEDY, frozenset())
    first = scheduler.next_step()
    assert first is not None
    scheduler.cancel(0)
    scheduler.add(1, [1], 5, GREEDY, frozenset())
    second = scheduler.next_step()
    assert second is not None
    assert second.releases == (0,)
    scheduler.step_failed(second.number)
    released = scheduler.next_step()
    assert released is None or released.releases == (1,)
    scheduler.step_done(first.number, [])
    scheduler.add(2, [1], 5, GREEDY, frozenset())
    seen = set(released.releases) if released else set()
    while (step := scheduler.next_step()) is not None:
        seen.update(step.releases)
    assert seen == {0, 1}
