"""The second tier under any order of events: everybody gets the right answer, and nothing leaks."""

from collections.abc import Collection

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import initialize, invariant, rule

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import ContinuousConfig

from .test_scheduler_machine import SchedulerMachine
from .tier_stages import Stages


class TierMachine(SchedulerMachine):
    """Stages finish their copies in order, each in its own time, and now and then fail one."""

    @initialize(
        blocks=st.integers(5, 8),
        stages=st.integers(1, 3),
        slots=st.sampled_from([3, 16]),
        store=st.sampled_from(["eager", "lazy"]),
        chunk=st.sampled_from([7, 64, 512]),
        budget=st.sampled_from([64, 700]),
        admission=st.sampled_from(["reserve", "preempt"]),
    )
    def begin(self, blocks, stages, slots, store, chunk, budget, admission) -> None:
        self.begin_with(
            ContinuousConfig(
                kv_tokens=blocks * BLOCK_TOKENS,
                max_in_flight=stages,
                prefill_chunk=chunk,
                step_tokens=budget,
                max_running=5,
                admission=admission,
                stages=stages,
                tier_slots=slots,
                tier_store=store,
            ),
            Stages(stages, blocks),
        )
        self.tier = self.policy.tier

    @rule(family=st.integers(0, 2), shared=st.sampled_from([128, 192]), new=st.integers(1, 40))
    def a_family_comes_back(self, family: int, shared: int, new: int) -> None:
        self.somebody_asks(family, shared, 1, new, None, 0, "a", None)

    @rule()
    def all_goes_well_for_a_while(self) -> None:
        for _ in range(40):
            self.steps_are_sent(2)
            if not self.something_happens():
                return

    @rule()
    def the_device_is_needed_for_something_else(self) -> None:
        pool = self.policy.pool
        pool.drop(pool.allocate(pool.free))

    @rule()
    def a_prefix_goes_and_comes_back(self) -> None:
        self.all_goes_well_for_a_while()
        self.the_device_is_needed_for_something_else()
        self.a_family_comes_back(0, 192, 3)
        self.steps_are_sent(2)

    @rule(stage=st.integers(0, 2), fails=st.sampled_from([(), (), (), range(4)]))
    def a_copy_is_done(self, stage: int, fails: Collection[int]) -> None:
        stages = self.pipeline.all
        number = stage % len(stages)
        if stages[number].jobs:
            event, failed = stages[number].finish(fails)
            self.scheduler.copied(event, number, failed)

    @rule(reached=st.integers(0, 2))
    def a_step_does_not_reach_all_stages(self, reached: int) -> None:
        step = self.scheduler.next_step()
        if step is None:
            return
        self.pipeline.run(step, min(reached, len(self.pipeline.all) - 1))
        for lost in self.scheduler.step_failed(step.number):
            assert lost not in self.ended
            self.ended[lost] = "failed"

    @invariant()
    def who_loads_is_counted(self) -> None:
        if hasattr(self, "scheduler"):
            assert self.scheduler.loading <= self.scheduler.running
            slots = self.tier.slots
            assert slots.free + slots.used == slots.capacity
            if not self.tier.copying:
                assert slots.used == self.tier.retired

    def something_happens(self) -> bool:
        for number, stage in enumerate(self.pipeline.all):
            if stage.jobs:
                self.scheduler.copied(stage.finish()[0], number)
                return True
        if super().something_happens():
            return True
        if self.tier.copying:
            # What was lost with the very last step goes out with somebody else's.
            self.somebody_asks(9, 0, 1, 1, None, 0, "a", None)
            return True
        return False


TierMachine.TestCase.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
TestTierMachine = TierMachine.TestCase
