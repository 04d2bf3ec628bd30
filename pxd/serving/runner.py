"""Runs one stage of the plan, in an executor process of its own."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan
from pxd.cluster.records import KvBlocks, StageReport
from pxd.executors.protocol import (
    ExecutorDied,
    ExecutorError,
    LoadSpec,
    MemoryReport,
    Progress,
    StageInfo,
    StepResult,
)
from pxd.models.errors import ModelError
from pxd.p2p.network import Network, NetworkError
from pxd.serving.coding import choose_coding
from pxd.serving.fitness import Fitness
from pxd.serving.slowness import Slowness, Weights
from pxd.serving.timings import (
    HeadFigures,
    StageTimings,
    blocks_are_news,
    figures_to_publish,
)
from pxd.serving.weights.run import Progress as FetchProgress
from pxd.settings import WireDtype
from pxd.wire import Buffer, Coding, Copied, Nack, NackCode, Sampled, Step, Tensor

log = logging.getLogger("pxd.serving.stage")

MAX_UNDER_WAY = 64
RETRY_FAILED_S = 30.0
FETCH_SHARE = 0.5
BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE_AFTER_S = 60.0
MEMORY_EVERY_S = 5.0
NO_TOKENS = Tensor("i32", (0,))


class RunningExecutor(Protocol):
    """What a stage needs of `pxd.executors.protocol.Executor` once its process runs."""

    pid: int
    hung: bool

    async def load(self, spec: LoadSpec, progress: Progress) -> StageInfo: ...
    def submit(self, step: Step, body: Buffer, take: Callable[[StepResult], None]) -> None: ...
    def send_as(self, coding: Coding | None) -> None: ...
    async def memory(self) -> MemoryReport: ...
    async def wait_died(self) -> str: ...

    @property
    def copied(self) -> "trio.MemoryReceiveChannel[Copied]": ...


_Result = tuple[Step, Sampled | Nack | tuple[Step, Buffer] | ExecutorError]
OpenExecutor = Callable[[], AbstractAsyncContextManager[RunningExecutor]]


class FindDirectory(Protocol):
    """A local directory with all that layers [start, end) of a model need. Raises `ModelError`."""

    async def __call__(
        self, name: str, fingerprint: str, start: int, end: int, progress: FetchProgress
    ) -> Path: ...


class Host(Protocol):
    """What a stage needs of its node."""

    network: Network
    open_executor: OpenExecutor
    find_directory: FindDirectory
    fitness: Fitness
    tier_bytes: int
    tier_directory: Path
    wire_dtype: WireDtype
    tensor_parallel: int

    def report_changed(self) -> None: ...
    async def nack(
        self, head: str, step: Step, code: NackCode, reason: str, requests: tuple[int, ...] = ()
    ) -> None: ...


class StageRunner:
    """One stage: keeps an executor with the right layers alive and passes steps through it.

    Nothing that happens in the executor process ends `run`: it is restarted with a growing pause,
    and the head is told by a `Nack` for every step that is lost.
    """

    def __init__(
        self,
        host: Host,
        model: ModelPlan,
        pipeline: PipelinePlan,
        stage: StagePlan,
    ) -> None:
        self._host = host
        self.model = model
        self.stage = stage
        self.cancel_scope = trio.CancelScope()
        self.finished = trio.Event()
        self._executor: RunningExecutor | None = None
        self._room = trio.Semaphore(MAX_UNDER_WAY)
        self._running: deque[tuple[Step, float]] = deque()
        # Unbounded: each has a place in `_room`.
        self._send_result, self._results = trio.open_memory_channel[_Result](math.inf)
        self._idle_since = 0.0
        self._timings = StageTimings()
        self._slowness = Slowness()
        self._hangs = self._out_of_memory = self._not_finite = 0
        self._hidden_bytes = 0
        self._told_coding: Coding | None = None
        self._published_at = self._blocks_told_at = -math.inf
        self._submitted = 0
        self.bind(pipeline)
        self.report = StageReport(
            model=model.name,
            pipeline=pipeline.id,
            start=stage.start,
            end=stage.end,
            state="loading",
            coding=self._coding,
        )

    @property
    def weights(self) -> Weights:
        """Two runners with equal weights differ only in the pipeline they serve."""
        return self.model.name, self.model.fingerprint, self.stage.start, self.stage.end

    def bind(self, pipeline: PipelinePlan) -> None:
        """Serve `pipeline` from now on; what is loaded stays."""
        nodes = [stage.node for stage in pipeline.stages]
        index = nodes.index(self.stage.node)
        self.pipeline = pipeline
        self.sender = nodes[index - 1] if index else self.stage.node
        self._next = nodes[index + 1] if index + 1 < len(nodes) else None
        self._coding = choose_coding(self._host.wire_dtype) if self._next else None

    def rebind(self, pipeline: PipelinePlan) -> None:
        self.bind(pipeline)
        # How fast the old pipeline was as a whole says nothing about this one.
        head = msgspec.structs.asdict(HeadFigures())
        self._set(pipeline=pipeline.id, coding=self._coding, kv=None, **head)
        self._forget()

    def _forget(self) -> None:
        """Have the executor give up what requests of the old pipeline have left: a spare may get no
        step for long. Another session makes it do so."""
        if self._executor is None:
            return
        step = Step(pipeline=self.pipeline.id, session=0, step=0, rows=(), tensor=NO_TOKENS)
        self._submitted += 1
        with contextlib.suppress(ExecutorDied):
            self._executor.submit(step, b"", lambda _: None)

    def follow_links(self, bandwidths: Mapping[str, float]) -> None:
        """`bandwidths` to other nodes in GB/s, as far as they are measured."""
        if self._next is not None:
            self._coding = choose_coding(
                self._host.wire_dtype,
                self._coding,
                hidden_bytes=self._hidden_bytes,
                bandwidth=bandwidths.get(self._next, 0.0),
                position_s=self._timings.prefill_s or self._timings.decode_s,
            )
            self._set(coding=self._coding)

    def _set(self, **changes: object) -> None:
        report = msgspec.structs.replace(self.report, **changes)
        if report != self.report:
            self.report = report
            self._host.report_changed()

    def publish_figures(self, head: HeadFigures) -> None:
        """Put what was measured and counted into the report where that is news."""
        self._set(
            out_of_memory=self._out_of_memory,
            not_finite=self._not_finite,
            slow=round(self._slowness.factor, 1),
        )
        measured = {
            "decode_s": self._timings.decode_s,
            "prefill_s": self._timings.prefill_s,
            **msgspec.structs.asdict(head),
        }
        told = {name: getattr(self.report, name) for name in measured}
        now = trio.current_time()
        news = figures_to_publish(told, measured, since=now - self._published_at)
        if news:
            self._published_at = now
            self._set(**news)

    def tell_blocks(self, blocks: KvBlocks | None) -> None:
        now = trio.current_time()
        if blocks_are_news(self.report.kv, blocks, since=now - self._blocks_told_at):
            self._blocks_told_at = now
            self._set(kv=blocks)

    def tell_requests(self, requests: int | None) -> None:
        self._set(requests=requests)

    async def feed(self, step: Step, body: Buffer) -> None:
        """Have the executor run a step; waits while `MAX_UNDER_WAY` are under way already."""
        if self.feed_now(step, body):
            return
        await self._room.acquire()
        if self.report.state != "ready":
            self._room.release()
            await self._nack(step, "not-ready", self.report.reason or self.report.state)
            return
        self._submit(step, body)

    def feed_now(self, step: Step, body: Buffer) -> bool:
        """Have the executor run a step, unless `feed` would have to wait."""
        if self.report.state != "ready":
            return False
        try:
            self._room.acquire_nowait()
        except trio.WouldBlock:
            return False
        self._submit(step, body)
        return True

    def _submit(self, step: Step, body: Buffer) -> None:
        self._submitted += 1
        self._running.append((step, trio.current_time()))
        # Where the executor has died, all of its steps are answered for together.
        with contextlib.suppress(ExecutorDied):
            if self._executor is not None:
                if self._told_coding != self._coding:
                    self._executor.send_as(self._coding)
                    self._told_coding = self._coding
                self._executor.submit(step, body, self._take)

    def _take(self, result: StepResult) -> None:
        """What became of the oldest step that the executor has."""
        if isinstance(result, ExecutorDied):
            return
        step, arrived = self._running.popleft()
        now = trio.current_time()
        if not isinstance(result, (Nack, ExecutorError)):
            seconds = now - max(arrived, self._idle_since)
            if self._slowness.add(step.rows, seconds, now):
                self._timings.add(step.rows, seconds)
        elif isinstance(result, Nack):
            self._out_of_memory += result.code == "out-of-memory"
            self._not_finite += result.code == "not-finite"
        self._idle_since = now
        self._send_result.send_nowait((step, result))

    async def run(self) -> None:
        """Serve until `cancel_scope` is cancelled."""
        try:
            with self.cancel_scope:
                await self._keep_running()
        finally:
            self._lose()
            self.finished.set()

    async def _keep_running(self) -> None:
        failures = 0
        while True:
            began = trio.current_time()
            try:
                await self._load_and_serve()
            except (ExecutorError, ModelError) as error:
                log.error("stage %s cannot be loaded: %s", self._label(), error)
                self._host.fitness.load_failed(self.model.name, trio.current_time(), str(error))
                await self._rest_after_failure(str(error))
            except ExecutorDied as error:
                failures = 0 if trio.current_time() - began > STABLE_AFTER_S else failures
                pause = BACKOFF_S[min(failures, len(BACKOFF_S) - 1)]
                failures += 1
                log.error(
                    "executor of stage %s died (%s); restarting in %g s",
                    self._label(),
                    error,
                    pause,
                )
                layers = (self.stage.start, self.stage.end)
                now = trio.current_time()
                self._host.fitness.died(self.model.name, layers, now, str(error))
                self._set(
                    state="restarting",
                    restarts=self.report.restarts + 1,
                    hangs=self._hangs,
                    reason=f"its executor died: {error}"[:2000],
                )
                await self._nack_lost(str(error))
                await trio.sleep(pause)
            except Exception as error:
                log.exception("stage %s failed", self._label())
                reason = f"{type(error).__name__}: {error}"
                self._host.fitness.load_failed(self.model.name, trio.current_time(), reason)
                await self._rest_after_failure(reason)

    async def _rest_after_failure(self, reason: str) -> None:
        self._set(state="failed", reason=reason[:2000])
        await self._nack_lost(reason)
        await trio.sleep(RETRY_FAILED_S)
        self._set(state="loading", progress=0.0, reason="")

    async def _load_and_serve(self) -> None:
        fetched = await self._host.find_directory(
            self.model.name,
            self.model.fingerprint,
            self.stage.start,
            self.stage.end,
            lambda done, words="": self._progress(done * FETCH_SHARE, words),
        )
        async with self._host.open_executor() as executor:
            try:
                await self._serve(executor, fetched)
            finally:
                self._executor = None
                self._hangs += executor.hung

    async def _serve(self, executor: RunningExecutor, fetched: Path) -> None:
        """Until the executor dies, which raises `ExecutorDied`."""
        spec = LoadSpec(
            path=str(fetched),
            start=self.stage.start,
            end=self.stage.end,
            fingerprint=self.model.fingerprint,
            kv_bytes=self.stage.kv_bytes,
            tier_bytes=self._host.tier_bytes,
            tier_directory=str(self._host.tier_directory),
            tensor_parallel=self._host.tensor_parallel,
        )
        info = await executor.load(
            spec, lambda done: self._progress(FETCH_SHARE + done * (1 - FETCH_SHARE))
        )
        self._timings = StageTimings()
        self._hidden_bytes, self._told_coding = info.hidden_bytes, None
        self._executor = executor
        log.info("stage %s is ready (executor pid %d)", self._label(), executor.pid)
        self._set(
            state="ready",
            progress=1.0,
            kv_tokens=info.kv_tokens,
            prefix_cache=info.prefix_cache,
            tier_slots=info.tier_slots,
            trims=info.trims,
            kv_held=0,
            kv_kept=0,
            reason="",
        )
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._pass_on)
            nursery.start_soon(self._report_copies, executor)
            nursery.start_soon(self._watch_memory, executor)
            death = await executor.wait_died()
            nursery.cancel_scope.cancel()
        raise ExecutorDied(death)

    def _progress(self, done: float, words: str = "") -> None:
        # A record travels to every node, so small advances are not worth a new version.
        if done - self.report.progress >= 0.05 or done >= 1.0 or words != self.report.reason:
            self._set(progress=min(max(done, 0.0), 1.0), reason=words)

    async def _pass_on(self) -> None:
        async for step, result in self._results:
            self._room.release()
            if step.pipeline != self.pipeline.id:
                await self._nack(step, "unknown-pipeline", "this stage serves another pipeline now")
            elif isinstance(result, Nack):
                await self._nack(step, result.code, result.reason, result.requests)
            elif isinstance(result, ExecutorError):
                await self._nack(step, "executor-failed", str(result))
            else:
                await self._send(step, result)

    async def _send(self, step: Step, result: Sampled | tuple[Step, Buffer]) -> None:
        try:
            if isinstance(result, Sampled):
                await self._host.network.send(self.pipeline.head, result)
            else:
                await self._host.network.send(self._next or self.pipeline.head, *result)
        except NetworkError as error:
            if isinstance(result, Sampled):
                log.warning("the head of %s is unreachable: %s", self._label(), error)
            else:
                await self._nack(step, "unreachable", f"next stage: {error}")

    async def _report_copies(self, executor: RunningExecutor) -> None:
        async for copied in executor.copied:
            try:
                await self._host.network.send(self.pipeline.head, copied)
            except NetworkError as error:
                # The head ends its session when it loses a stage, and waits for nothing then.
                log.warning("the head of %s is unreachable: %s", self._label(), error)

    async def _watch_memory(self, executor: RunningExecutor) -> None:
        """Report what the executor holds, as long as steps change that."""
        asked = self._submitted
        while True:
            await trio.sleep(MEMORY_EVERY_S)
            if asked == self._submitted:
                continue
            asked = self._submitted
            try:
                memory = await executor.memory()
            except ExecutorDied:
                return  # `_serve` learns of it, too.
            except ExecutorError as error:
                log.warning("stage %s does not say what it holds: %s", self._label(), error)
            else:
                self._set(kv_held=memory.held, kv_kept=memory.kept)

    async def _nack(
        self, step: Step, code: NackCode, reason: str, requests: tuple[int, ...] = ()
    ) -> None:
        await self._host.nack(self.pipeline.head, step, code, reason, requests)

    async def _nack_lost(self, reason: str) -> None:
        for step in self._lose():
            await self._nack(step, "executor-died", reason)

    def _lose(self) -> list[Step]:
        """Forget the steps that were given to the executor, and return them."""
        lost = []
        with contextlib.suppress(trio.WouldBlock):
            while True:
                lost.append(self._results.receive_nowait()[0])
        lost += [step for step, _ in self._running]
        self._running.clear()
        for _ in lost:
            self._room.release()
        return lost

    def _label(self) -> str:
        return f"{self.model.name} [{self.stage.start}, {self.stage.end})"
