"""The scheduler and its blocks under any order of events: nothing is lost, leaked or used twice."""

from collections import deque

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import NeverFits, QueueFull, Scheduler
from pxd.wire import MAX_GUESSES, SampledToken

from .pipeline import EOS, Oracle, Pipeline, answer, request

MAX_WAITING = 12


class SchedulerMachine(RuleBasedStateMachine):
    """Stages run steps in order; results come back in order, some late."""

    @initialize(
        blocks=st.integers(4, 24),
        in_flight=st.integers(1, 4),
        chunk=st.sampled_from([1, 7, 64, 512]),
        budget=st.sampled_from([3, 64, 700]),
        running=st.integers(1, 6),
        admission=st.sampled_from(["reserve", "preempt"]),
        prefix_cache=st.booleans(),
    )
    def begin(self, blocks, in_flight, chunk, budget, running, admission, prefix_cache) -> None:
        config = ContinuousConfig(
            kv_tokens=blocks * BLOCK_TOKENS,
            max_in_flight=in_flight,
            prefill_chunk=chunk,
            step_tokens=budget,
            max_running=running,
            admission=admission,
            prefix_cache=prefix_cache,
        )
        self.begin_with(config, Pipeline(capacity=blocks))

    def begin_with(self, config: ContinuousConfig, pipeline) -> None:
        self.policy = Continuous(config, Oracle)
        self.scheduler = Scheduler(self.policy, max_waiting=MAX_WAITING)
        self.pipeline = pipeline
        self.flying: deque[tuple[int, list[SampledToken]]] = deque()
        self.members: dict[int, set[int]] = {}
        self.doomed: set[int] = set()
        self.prompts: dict[int, tuple[list[int], int, int | None]] = {}
        self.answers: dict[int, list[int]] = {}
        self.ended: dict[int, str] = {}
        self.now = 0.0

    @rule(
        family=st.integers(0, 2),
        shared=st.sampled_from([0, 64, 65, 128, 200]),
        own=st.integers(1, 90),
        new=st.integers(1, 70),
        eos=st.none() | st.integers(0, 40),
        priority=st.integers(0, 2),
        source=st.sampled_from(["a", "b"]),
        patience=st.none() | st.integers(1, 30),
    )
    def somebody_asks(self, family, shared, own, new, eos, priority, source, patience) -> None:
        number = len(self.prompts)
        tokens = [family * 1000 + i for i in range(shared)] + [number + 5000] * own
        asked = request(
            number,
            tokens,
            new,
            eos=frozenset({EOS}),
            priority=priority,
            source=source,
            deadline=float("inf") if patience is None else self.now + patience,
        )
        full = self.scheduler.waiting >= MAX_WAITING
        never = blocks_for(len(tokens) + new) > self.policy.pool.capacity
        try:
            self.scheduler.add(asked)
        except NeverFits:
            assert never
        except QueueFull:
            assert full
        else:
            assert not never
            assert not full
            stops = eos is not None and eos < new
            self.prompts[number] = tokens, new, eos if stops else None
            self.answers[number] = []
            if stops:
                self.pipeline.ends[number] = len(tokens) + eos
            return
        self.prompts[number] = [], 0, None
        self.ended[number] = "refused"

    @rule(most=st.sampled_from([0, 1, 4, MAX_GUESSES]))
    def guesses_are_made(self, most: int) -> None:
        self.policy.guesses = most

    @precondition(lambda self: self.flying)
    @rule(count=st.integers(1, 3))
    def results_return(self, count: int) -> None:
        for _ in range(min(count, len(self.flying))):
            number, sampled = self.flying.popleft()
            if number in self.doomed:
                assert self.scheduler.step_failed(number) == []
                continue
            for result in self.scheduler.step_done(number, sampled):
                assert result.request not in self.ended
                self.answers[result.request] += result.tokens
                if result.finish:
                    self.ended[result.request] = result.finish

    @rule(count=st.integers(1, 6))
    def steps_are_sent(self, count: int) -> None:
        for _ in range(count):
            step = self.scheduler.next_step()
            if step is None:
                return
            assert len(step.tokens) <= self.policy.config.step_tokens
            self.members[step.number] = {row.request for row in step.rows}
            self.flying.append((step.number, self.pipeline.run(step)))
            assert len(self.flying) <= self.policy.max_in_flight

    @precondition(lambda self: self.prompts)
    @rule(which=st.integers(0, 1000))
    def somebody_leaves(self, which: int) -> None:
        number = which % len(self.prompts)
        if self.scheduler.cancel(number):
            assert number not in self.ended
            self.ended[number] = "cancelled"
        else:
            assert number in self.ended

    @rule(seconds=st.integers(1, 10))
    def time_passes(self, seconds: int) -> None:
        self.now += seconds
        for number in self.scheduler.expire(self.now):
            assert number not in self.ended
            self.ended[number] = "deadline"

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 3))
    def a_stage_has_no_memory(self, which: int) -> None:
        """It forgets the step's requests, and so it refuses later steps with them, whose others
        have gaps then. All of them begin again, unless there was next to nothing to do."""
        place = which % len(self.flying)
        number, _ = self.flying[place]
        if number in self.doomed:
            return
        del self.flying[place]
        ended = self.scheduler.step_failed(number, starved=True)
        for lost in ended:
            assert lost not in self.ended
            self.ended[lost] = "failed"
        unknown = self.members[number] - set(ended)
        for later in [later for later, _ in self.flying if later > number]:
            if self.members[later] & unknown:
                self.doomed.add(later)
                unknown |= self.members[later]

    @precondition(lambda self: self.flying)
    @rule()
    def the_last_step_fails(self) -> None:
        """The stage has forgotten its requests, and what they held is worth nothing."""
        number, _ = self.flying.pop()
        for lost in self.scheduler.step_failed(number):
            assert lost not in self.ended
            self.ended[lost] = "failed"

    @invariant()
    def nothing_is_lost(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        here = self.scheduler.requests
        assert len(here) == len(set(here))
        assert set(here) == self.prompts.keys() - self.ended.keys()
        pool = self.policy.pool
        assert pool.free + pool.used == pool.capacity
        assert self.scheduler.waiting <= MAX_WAITING

    def something_happens(self) -> bool:
        if self.flying:
            self.results_return(1)
            return True
        return False

    def teardown(self) -> None:
        if not hasattr(self, "scheduler"):
            return
        for _ in range(20_000):
            self.steps_are_sent(8)
            if not self.something_happens():
                break
        assert not self.scheduler.requests, "somebody starves"
        assert self.policy.pool.used == 0
        for number, (tokens, new, eos) in self.prompts.items():
            how, got = self.ended[number], self.answers.get(number, [])
            expected = answer(tokens, new if eos is None else eos) if tokens else []
            if how in ("stop", "length"):
                assert got == expected
                assert how == ("length" if eos is None else "stop")
            else:
                assert got == expected[: len(got)]


SchedulerMachine.TestCase.settings = settings(
    max_examples=150, stateful_step_count=40, deadline=None
)
TestSchedulerMachine = SchedulerMachine.TestCase
