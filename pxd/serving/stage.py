"""All stages that the plan gives this node."""

import logging
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import trio

from pxd.cluster.plans import Plan, spare_stages
from pxd.cluster.records import KvBlocks, PeerLink, StageReport, Unfit
from pxd.p2p.network import Network, NetworkError
from pxd.serving.fitness import Fitness
from pxd.serving.runner import FindDirectory, OpenExecutor, StageRunner
from pxd.serving.slowness import SlowNode
from pxd.serving.timings import HeadFigures
from pxd.settings import WireDtype
from pxd.wire import Buffer, Frame, Nack, NackCode, Step

log = logging.getLogger("pxd.serving.stage")


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
        self.tensor_parallel = 1
        self.network = network
        self.open_executor = open_executor
        self.find_directory = find_directory
        self.fitness = Fitness()
        self._slow = SlowNode()
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

    def spread_over(self, ranks: int) -> None:
        """Stages that are loaded from now on are spread over so many GPUs of this machine."""
        self.tensor_parallel = ranks

    def follow_links(self, links: Iterable[PeerLink]) -> None:
        """`links` as they are in the node's record; to be called about once a second."""
        bandwidths = {link.peer: link.bandwidth for link in links}
        for runner in self._runners.values():
            runner.follow_links(bandwidths)

    def report_changed(self) -> None:
        self._report(tuple(runner.report for runner in self._runners.values()))

    def unfit(self) -> tuple[Unfit, ...]:
        """The models that this node leaves to others for now, since it keeps failing at them."""
        return self.fitness.unfit(trio.current_time())

    def slow(self) -> float:
        """How many times slower than usual this node works, 0 if not; to be called about once a
        second."""
        factors = {runner.weights: runner.report.slow for runner in self._runners.values()}
        return self._slow.update(factors, trio.current_time())

    def forgive(self) -> None:
        """Forget what has gone wrong: a person has seen to it."""
        self.fitness.forgive()
        self._slow.forget()

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

    def tell_blocks(self, blocks: Mapping[str, KvBlocks | None]) -> None:
        """Report the KV blocks of the pipelines that begin here, by pipeline id, where that is
        news. To be called about once a second."""
        for runner in self._runners.values():
            runner.tell_blocks(blocks.get(runner.pipeline.id))

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
