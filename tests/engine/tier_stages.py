"""Stages with a second tier that copy what they hold, as late as they may.

A copy reads and writes only when it is finished, so that a block or a slot that was given to
somebody else in the meantime shows as wrong content.
"""

from collections import deque
from collections.abc import Callable, Collection

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import PlannedStep, Scheduler
from pxd.wire import Copy, SampledToken

from .pipeline import Pipeline


class TierStage(Pipeline):
    """Slots hold the tokens of a block and all before it, which is what its KV depends on."""

    def __init__(self, capacity: int | None = None) -> None:
        super().__init__(capacity=capacity)
        self.slots: dict[int, tuple[int, ...]] = {}
        self.loaded = 0
        self.jobs: deque[tuple[Copy, Callable[[Collection[int]], list[int]]]] = deque()

    def run(self, step: PlannedStep) -> list[SampledToken]:
        sampled = super().run(step)
        for copy, begin in ((step.store, self._store), (step.load, self._load)):
            if copy is not None:
                assert len(copy.blocks) == len(copy.slots) > 0
                assert len(set(copy.blocks)) == len(copy.blocks)
                self.jobs.append((copy, begin(copy)))
        return sampled

    def finish(self, broken: Collection[int] = ()) -> tuple[int, list[int]]:
        """Do the oldest copy, with slots `broken`; returns its event and the slots that failed."""
        copy, work = self.jobs.popleft()
        return copy.event, work(broken)

    def _store(self, copy: Copy) -> Callable[[Collection[int]], list[int]]:
        places = [self.mirror.place_of(block) for block in copy.blocks]

        def work(broken: Collection[int]) -> list[int]:
            failed = []
            for block, slot, place in zip(copy.blocks, copy.slots, places, strict=True):
                assert self.mirror.place_of(block) == place
                held = self._until(place)
                if slot in broken or held is None:
                    failed.append(slot)
                else:
                    self.slots[slot] = held
            return failed

        return work

    def _until(self, place: tuple[int, int] | None) -> tuple[int, ...] | None:
        if place is None:
            return None
        piece, number = place
        end = (number + 1) * BLOCK_TOKENS
        held = tuple(self.pieces[piece][:end])
        assert len(held) == end, "only full blocks are stored"
        return held

    def _load(self, copy: Copy) -> Callable[[Collection[int]], list[int]]:
        places = [self.mirror.place_of(block) for block in copy.blocks]

        def work(broken: Collection[int]) -> list[int]:
            triples = list(zip(copy.blocks, copy.slots, places, strict=True))
            bad = {place[0] for _, slot, place in triples if place and slot in broken}
            for block, slot, place in triples:
                if place is None or place[0] not in self.open.values():
                    continue
                assert self.mirror.place_of(block) == place
                if place[0] not in bad:
                    piece = self.pieces[place[0]]
                    assert len(piece) == place[1] * BLOCK_TOKENS
                    assert self.slots[slot][: len(piece)] == tuple(piece)
                    piece.extend(self.slots[slot][len(piece) :])
                    self.loaded += 1
            return sorted(set(copy.slots).intersection(broken))

        return work


class Stages:
    """A pipeline of `count` stages, of which the last one answers."""

    def __init__(self, count: int, capacity: int | None = None) -> None:
        self.all = [TierStage(capacity) for _ in range(count)]

    @property
    def ends(self) -> dict[int, int]:
        return self.all[-1].ends

    def run(self, step: PlannedStep, count: int | None = None) -> list[SampledToken]:
        """Run a step, on the first `count` stages only where that is given."""
        sampled: list[SampledToken] = []
        for stage in self.all[:count]:
            sampled = stage.run(step)
        return sampled


class Tiered:
    """A scheduler with its stages. Steps are done at once, copies when somebody says so."""

    def __init__(self, stages: int, blocks: int = 64, slots: int = 64, **options: object) -> None:
        config = ContinuousConfig(
            kv_tokens=blocks * BLOCK_TOKENS,
            stages=stages,
            tier_slots=slots,
            **options,  # type: ignore[arg-type]
        )
        self.policy = Continuous(config)
        self.scheduler = Scheduler(self.policy)
        self.stages = Stages(stages, blocks)
        self.pool, self.tier = self.policy.pool, self.policy.tier
        self.answers: dict[int, list[int]] = {}
        self.steps: list[PlannedStep] = []

    def step(self) -> PlannedStep | None:
        step = self.scheduler.next_step()
        if step is not None:
            self.steps.append(step)
            for result in self.scheduler.step_done(step.number, self.stages.run(step)):
                self.answers.setdefault(result.request, []).extend(result.tokens)
        return step

    def run(self) -> None:
        """Steps until there are none; no copy finishes."""
        while self.step() is not None:
            pass

    def finish(self, broken: Collection[int] = (), only: Collection[int] | None = None) -> None:
        """The oldest copy of every stage (or of `only`) is done; on the last, `broken` fails."""
        for number, stage in enumerate(self.stages.all):
            if stage.jobs and (only is None or number in only):
                last = stage is self.stages.all[-1]
                event, failed = stage.finish(broken if last else ())
                self.scheduler.copied(event, number, failed)

    def settle(self) -> None:
        """Steps and copies until there is nothing left to do."""
        self.run()
        while any(stage.jobs for stage in self.stages.all):
            self.finish()
            self.run()
        assert not self.tier.copying

    @property
    def stores(self) -> list[Copy]:
        return [step.store for step in self.steps if step.store is not None]

    @property
    def loads(self) -> list[Copy]:
        return [step.load for step in self.steps if step.load is not None]
