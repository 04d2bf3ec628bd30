"""The second tier through heads and stages: hits, and a stage lost in the middle of a copy."""

from collections import deque
from collections.abc import Callable

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.mirror import BlockMirror
from pxd.executors.protocol import LoadSpec, StageInfo
from pxd.wire import Copied, Copy, Step

from .harness import ArithmeticExecutor, ServingCluster, ServingNode
from .test_serving import NAMES, ask, expected

BLOCKS = 7
SLOTS = 32
LONG = "a prompt of three blocks" * 8 + "?"
OTHER = "another one that needs them all" * 13


class TierExecutor(ArithmeticExecutor):
    """Begins requests with what others have left, and copies when `finish_copies` says so."""

    def __init__(self, node: ServingNode) -> None:
        super().__init__(node)
        self.session = -1
        self.slots: dict[int, list[float]] = {}
        self.jobs: deque[tuple[Step, Copy, Callable[[Copy], None]]] = deque()
        self.loaded = 0
        self._forget()

    def _forget(self) -> None:
        self.mirror = BlockMirror()
        self.pieces: dict[int, list[float]] = {}

    async def load(self, spec: LoadSpec, progress: object) -> StageInfo:
        info = await super().load(spec, progress)
        return msgspec.structs.replace(
            info, prefix_cache=True, tier_slots=SLOTS, kv_tokens=BLOCKS * BLOCK_TOKENS
        )

    async def release(self, requests: tuple[int, ...]) -> None:
        for piece in self.mirror.release(requests):
            del self.pieces[piece]
        await super().release(requests)

    def open(self, step: Step) -> None:
        if step.session != self.session:
            self._forget()
            self.session = step.session
        for opening in step.openings:
            runs = self.mirror.open(opening)
            piece: list[float] = []
            for run in runs:
                end = (run.first + run.count) * BLOCK_TOKENS
                piece += self.pieces[run.piece][run.first * BLOCK_TOKENS : end]
            self.caches[opening.request] = piece
            self.pieces[self.mirror.piece_of(opening.request)] = piece
        for piece_number in self.mirror.grant(step.grants):
            del self.pieces[piece_number]
        for copy, work in ((step.store, self._store), (step.load, self._load)):
            if copy is not None:
                self.jobs.append((step, copy, work))

    def _store(self, copy: Copy) -> None:
        for block, slot in zip(copy.blocks, copy.slots, strict=True):
            piece, place = self.mirror.place_of(block) or (-1, -1)
            begin = place * BLOCK_TOKENS
            self.slots[slot] = self.pieces[piece][begin : begin + BLOCK_TOKENS]

    def _load(self, copy: Copy) -> None:
        for block, slot in zip(copy.blocks, copy.slots, strict=True):
            piece, place = self.mirror.place_of(block) or (-1, -1)
            assert len(self.pieces[piece]) == place * BLOCK_TOKENS
            self.pieces[piece] += self.slots[slot]
            self.loaded += 1

    def finish_copies(self) -> None:
        while self.jobs:
            step, copy, work = self.jobs.popleft()
            if step.session == self.session:
                work(copy)
            self.send_copied.send_nowait(
                Copied(pipeline=step.pipeline, session=step.session, event=copy.event)
            )


def tier_of(cluster: ServingCluster):
    [head] = cluster.nodes["a"].heads._heads.values()
    assert head._scheduler is not None
    return head._scheduler.policy


def executors(cluster: ServingCluster, size: int) -> list[TierExecutor]:
    return [cluster.nodes[name].executors[-1] for name in NAMES[:size]]  # type: ignore[misc]


async def copy_all_the_time(cluster: ServingCluster, size: int) -> None:
    while True:
        for executor in executors(cluster, size):
            executor.finish_copies()
        await trio.sleep(0.01)


@pytest.fixture(autouse=True)
def tier_executors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tests.serving.harness.ArithmeticExecutor", TierExecutor)


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_hit_is_loaded_on_all_stages(size: int, clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster, trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish(*NAMES[:size]))
        nursery.start_soon(copy_all_the_time, cluster, size)
        for text in (LONG, OTHER, LONG):
            assert (await ask(cluster.nodes["c"], text, 5))[0] == expected(text, 5, size)
        assert [executor.loaded for executor in executors(cluster, size)] == [3] * size
        policy = tier_of(cluster)
        await cluster.until(lambda: not policy.tier.copying)
        assert policy.pool.used == policy.tier.slots.used == 0
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("kind", ["store", "load"])
@pytest.mark.parametrize("size", [1, 2, 3])
async def test_a_stage_that_is_lost_in_the_middle_of_a_copy(
    size: int, kind: str, clock: MockClock
) -> None:
    """Nobody's answer is lost, nothing stays held, and what the others report late is ignored."""
    async with ServingCluster(*NAMES).running() as cluster, trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish(*NAMES[:size]))
        answers: list[str] = []

        async def one(text: str) -> None:
            answers.append((await ask(cluster.nodes["c"], text, 5))[0])

        if kind == "load":
            with trio.CancelScope() as copying:
                async with trio.open_nursery() as background:
                    background.start_soon(copy_all_the_time, cluster, size)
                    await one(LONG)
                    await one(OTHER)
                    await cluster.until(lambda: not tier_of(cluster).tier.copying)
                    copying.cancel()
            nursery.start_soon(one, LONG)
        else:
            await one(LONG)
        stages = executors(cluster, size)
        await cluster.until(lambda: all(stage.jobs for stage in stages))
        before = tier_of(cluster)
        assert before.tier.copying
        assert before.pool.used >= 3
        victim = cluster.nodes[NAMES[size - 1]]
        victim.executors[-1].die("killed by signal 9")
        await cluster.until(lambda: len(victim.executors) == 2)
        await cluster.until(lambda: victim.stages._runners and is_ready(cluster, size))
        nursery.start_soon(copy_all_the_time, cluster, size)
        for text in (LONG, OTHER, LONG):
            await one(text)
        await cluster.until(lambda: len(answers) == (6 if kind == "load" else 4))
        wanted = {expected(text, 5, size) for text in (LONG, OTHER)}
        assert set(answers) == wanted
        after = tier_of(cluster)
        assert after is not before
        await cluster.until(lambda: not after.tier.copying)
        assert after.pool.used == after.tier.slots.used == 0
        assert victim.executors[-1].loaded > 0  # type: ignore[attr-defined]
        nursery.cancel_scope.cancel()


async def test_a_copy_that_never_ends_is_not_waited_for(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster, trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish("a", "b"))
        await ask(cluster.nodes["c"], LONG, 5)
        before = tier_of(cluster)
        await cluster.until(lambda: before.tier.copying)
        await cluster.until(lambda: not is_ready(cluster, 2))
        cluster.follow()
        assert tier_of(cluster) is not before
        nursery.start_soon(copy_all_the_time, cluster, 2)
        assert (await ask(cluster.nodes["c"], LONG, 5))[0] == expected(LONG, 5, 2)
        nursery.cancel_scope.cancel()


def is_ready(cluster: ServingCluster, size: int) -> bool:
    [head] = cluster.nodes["a"].heads._heads.values()
    return head._scheduler is not None
