"""Runs the stages that the plan gives this node, each in an executor process of its own."""

import contextlib
import logging
import math
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from contextlib import AbstractAsyncContextManager
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan, StagePlan, spare_stages
from pxd.cluster.records import PeerLink, StageReport
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
from pxd.serving.timings import HeadFigures, StageTimings, figures_to_publish
from pxd.settings import WireDtype
from pxd.wire import Buffer, Coding, Copied, Frame, Nack, NackCode, Sampled, Step

log = logging.getLogger("pxd.serving.stage")

MAX_UNDER_WAY = 64
RETRY_FAILED_S = 30.0
FETCH_SHARE = 0.5
BACKOFF_S = (0.2, 1.0, 2.0, 5.0, 10.0, 30.0)
STABLE_AFTER_S = 60.0


class RunningExecutor(Protocol):
    """What a stage needs of `pxd.executors.protocol.Executor` once its process runs."""

    pid: int

    async def load(self, spec: LoadSpec, progress: Progress) -> StageInfo: ...
    def submit(self, step: Step, body: Buffer, take: Callable[[StepResult], None]) -> None: ...
    def send_as(self, coding: Coding | None) -> None: ...
    async def memory(self) -> MemoryReport: ...
    async def wait_died(self) -> str: ...

    @property
    def copied(self) -> "trio.MemoryReceiveChannel[Copied]": ...


_Result = tuple[Step, Sampled | Nack | tuple[Step, Buffer] | ExecutorError]
OpenExecutor = Callable[[], AbstractAsyncContextManager[RunningExecutor]]
FindDirectory = Callable[[str, int, int, Progress], Awaitable[Path]]


class StageRunner:
    """One stage: keeps an executor with the right layers alive and passes steps through it.

    Nothing that happens in the executor process ends `run`: it is restarted with a growing pause,
    and the head is told by a `Nack` for every step that is lost.
    """

    def __init__(
        self,
        host: "StageHost",
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
        self._hidden_bytes = 0
        self._told_coding: Coding | None = None
        self._published_at = -math.inf
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
    def weights(self) -> tuple[str, str, int, int]:
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
        self._set(pipeline=pipeline.id, coding=self._coding, **head)

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
        """Put what was measured into the report where that is news."""
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
            self._timings.add(step.rows, now - max(arrived, self._idle_since))
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
                self._set(
                    state="restarting",
                    restarts=self.report.restarts + 1,
                    reason=f"its executor died: {error}"[:2000],
                )
                await self._nack_lost(str(error))
                await trio.sleep(pause)
            except Exception as error:
                log.exception("stage %s failed", self._label())
                await self._rest_after_failure(f"{type(error).__name__}: {error}")

    async def _rest_after_failure(self, reason: str) -> None:
        self._set(state="failed", reason=reason[:2000])
        await self._nack_lost(reason)
        await trio.sleep(RETRY_FAILED_S)
        self._set(state="loading", progress=0.0, reason="")

    async def _load_and_serve(self) -> None:
        start, end = self.stage.start, self.stage.end
        fetched = await self._host.find_directory(
            self.model.name, start, end, lambda done: self._progress(done * FETCH_SHARE)
        )
        async with self._host.open_executor() as executor:
            spec = LoadSpec(
                path=str(fetched),
                start=start,
                end=end,
                fingerprint=self.model.fingerprint,
                kv_bytes=self.stage.kv_bytes,
                tier_bytes=self._host.tier_bytes,
                tier_directory=str(self._host.tier_directory),
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
                reason="",
            )
            try:
                async with trio.open_nursery() as nursery:
                    nursery.start_soon(self._pass_on)
                    nursery.start_soon(self._report_copies, executor)
                    death = await executor.wait_died()
                    nursery.cancel_scope.cancel()
            finally:
                self._executor = None
            raise ExecutorDied(death)

    def _progress(self, done: float) -> None:
        # A record travels to every node, so small advances are not worth a new version.
        if done - self.report.progress >= 0.05 or done >= 1.0:
            self._set(progress=min(max(done, 0.0), 1.0))

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


class StageHost:
    """All stages of this node. `report` is called with the stages' reports whenever one changes."""

    def __init__(
        self,
        network: Network,
        open_executor: OpenExecutor,
        find_directory: FindDirectory,
        report: Callable[[tuple[StageReport, ...]], None],
    ) -> None:
        self.tier_bytes, self.tier_directory = 0, Path()
        self.wire_dtype: WireDtype = "native"
        self.network = network
        self.open_executor = open_executor
        self.find_directory = find_directory
        self._report = report
        self._runners: dict[str, StageRunner] = {}
        self._plan: Plan | None = None
        self._plan_changed = trio.Event()

    def apply(self, plan: Plan) -> None:
        """Follow a new plan. Returns at once; `run` makes it so and reports tell how far it is."""
        self._plan = plan
        self._plan_changed.set()

    def allow_tier(self, size: int, directory: Path) -> None:
        """Stages that are loaded from now on have a second KV tier of up to `size` bytes each;
        where it is a file, it lies in `directory`."""
        self.tier_bytes, self.tier_directory = size, directory

    def send_as(self, wire_dtype: WireDtype) -> None:
        """How stages that are set up from now on send hidden states to the next stage."""
        self.wire_dtype = wire_dtype

    def follow_links(self, links: Iterable[PeerLink]) -> None:
        """`links` as they are in the node's record; to be called about once a second."""
        bandwidths = {link.peer: link.bandwidth for link in links}
        for runner in self._runners.values():
            runner.follow_links(bandwidths)

    def report_changed(self) -> None:
        self._report(tuple(runner.report for runner in self._runners.values()))

    def publish_figures(self, heads: Mapping[str, HeadFigures]) -> None:
        """Report what stages have measured of themselves, and `heads` of whole pipelines by id.

        Cheap, and silent unless a figure is news; to be called about once a second.
        """
        for runner in self._runners.values():
            runner.publish_figures(heads.get(runner.pipeline.id, HeadFigures()))

    def tell_requests(self, loads: Mapping[str, int]) -> None:
        """Report how many requests the retiring pipelines that begin here have left; `loads` by
        pipeline id. To be called about once a second."""
        models = self._plan.models if self._plan else ()
        retiring = {pipeline.id for model in models for pipeline in model.retiring}
        for runner in self._runners.values():
            at_head = runner.pipeline.id in retiring and runner.stage.start == 0
            runner.tell_requests(loads.get(runner.pipeline.id, 0) if at_head else None)

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            while True:
                await self._plan_changed.wait()
                self._plan_changed = trio.Event()
                if self._plan is not None:
                    await self._follow(self._plan, nursery)

    async def _follow(self, plan: Plan, nursery: trio.Nursery) -> None:
        wanted = {
            pipeline.id: (model, pipeline, stage)
            for model in plan.models
            for pipeline in model.all_pipelines
            for stage in pipeline.stages
            if stage.node == self.network.peer_id
        }
        wanted |= {
            pipeline.id: (model, pipeline, pipeline.stages[0])
            for model in plan.models
            for pipeline in spare_stages(model)
            if pipeline.head == self.network.peer_id
        }
        spare = [runner for key, runner in self._runners.items() if key not in wanted]
        runners = {key: runner for key, runner in self._runners.items() if key in wanted}
        missing = []
        for key, (model, pipeline, stage) in wanted.items():
            if key in runners:
                continue
            weights = (model.name, model.fingerprint, stage.start, stage.end)
            reusable = next((runner for runner in spare if runner.weights == weights), None)
            if reusable is None:
                missing.append((model, pipeline, stage))
                continue
            spare.remove(reusable)
            reusable.rebind(pipeline)
            runners[key] = reusable
        self._runners = runners
        # What goes is gone before anything is loaded: the plan counts on its memory.
        for runner in spare:
            runner.cancel_scope.cancel()
        for runner in spare:
            await runner.finished.wait()
        for model, pipeline, stage in missing:
            runner = StageRunner(self, model, pipeline, stage)
            self._runners[pipeline.id] = runner
            nursery.start_soon(runner.run)
        self.report_changed()

    def expects(self, peer: str, frame: Frame) -> bool:
        """Whether to read the body of a frame; it may be large, and has to come from the stage
        before this one."""
        runner = self._runners.get(frame.pipeline) if isinstance(frame, Step) else None
        return runner is not None and runner.sender == peer

    async def feed(self, peer: str, step: Step, body: Buffer) -> None:
        """Take a step from `peer`: the node before this one, or this node itself at the head."""
        runner = self._runners.get(step.pipeline)
        head = self._head_of(step.pipeline)
        if runner is not None and peer != runner.sender:
            log.warning("dropped a step from %s, which is not the stage before this one", peer)
        elif runner is not None and memoryview(body).nbytes == step.tensor.nbytes:
            await runner.feed(step, body)
        elif head is None:
            log.info("dropped a step of an unknown pipeline from %s", peer)
        else:
            # Or only just: then it has come without its body.
            await self.nack(head, step, "not-ready", "the stage has not been set up yet")

    def feed_now(self, step: Step, body: Buffer) -> bool:
        """Take a step of a pipeline that begins at this node, unless `feed` would have to wait."""
        runner = self._runners.get(step.pipeline)
        own = runner is not None and runner.sender == self.network.peer_id
        return runner is not None and own and runner.feed_now(step, body)

    def _head_of(self, pipeline_id: str) -> str | None:
        found = self._plan.pipeline(pipeline_id) if self._plan else None
        return found[1].head if found else None

    async def nack(
        self, head: str, step: Step, code: NackCode, reason: str, requests: tuple[int, ...] = ()
    ) -> None:
        frame = Nack(
            pipeline=step.pipeline,
            session=step.session,
            step=step.step,
            code=code,
            reason=reason[:2000],
            requests=requests,
        )
        try:
            await self.network.send(head, frame)
        except NetworkError as error:
            log.warning("cannot tell the head %s that a step failed (%s): %s", head, code, error)
