"""Makes the cluster's plans while this node leads it."""

import logging
from collections.abc import Callable
from functools import partial

import msgspec
import trio

from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan, pipeline_id
from pxd.executors.protocol import ExecutorDied, ExecutorError, ModelDescription
from pxd.models.errors import ModelError
from pxd.planning.model import Allocation, ModelCost, NodeOffer, PlanSettings, Shortage
from pxd.planning.pipeline import plan_pipeline
from pxd.serving.models import ModelSource
from pxd.serving.plansync import PlanSync
from pxd.serving.readiness import Members, readiness
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving.planner")

# What both leave over is room for activations and the library's own buffers.
PLAN_SETTINGS = PlanSettings(weight_share=0.75, kv_share=0.2)
BURST_S = 1.0
RETRY_S = 30.0


class Office(msgspec.Struct, frozen=True):
    """Whether this node leads, and in which term."""

    held: bool
    term: int


class Planner:
    """Replans when the inputs of the plan in force have changed, and only then.

    A plan that another leader made and that still fits is left in force.
    """

    def __init__(
        self,
        me: str,
        models: ModelSource,
        sync: PlanSync,
        office: Callable[[], Office],
        members: Callable[[], Members],
        chosen: Callable[[], str],
    ) -> None:
        self._me = me
        self._models = models
        self._sync = sync
        self._office = office
        self._members = members
        self._chosen = chosen
        self._failures: dict[str, tuple[float, ModelPlan]] = {}

    async def run(self, changed: Signal) -> None:
        while True:
            event = changed.event
            retry = await self._replan() if self._office().held else False
            with trio.move_on_after(RETRY_S if retry else float("inf")):
                await event.wait()
            # Nodes start and records change in bursts; one plan for all of them is enough.
            await trio.sleep(BURST_S)

    async def _replan(self) -> bool:
        """Publish a plan if it differs from the one in force; say whether to try again later."""
        model = await self._plan_model(self._chosen())
        office = self._office()
        current = self._sync.plan
        failed = model.state == "failed"
        if not office.held or self._is_in_force(model):
            return failed
        if failed and self._still_serves(model.name):
            log.warning(
                "the plan in force stays, for %s cannot be planned here: %s",
                model.name,
                model.reason,
            )
            return True
        version = 1
        if current is not None and current.epoch.term == office.term:
            version = current.epoch.version + 1
        log.info("planning %s: %s", model.name, model.reason or _describe_chain(model))
        await self._sync.publish(Plan(Epoch(office.term, self._me, version), (model,)))
        return failed

    def _is_in_force(self, model: ModelPlan) -> bool:
        """Two failures of one model are the same plan, whatever words they come with."""
        current = self._in_force(model.name)
        if current is None:
            return False
        return current == model or current.state == model.state == "failed"

    def _still_serves(self, name: str) -> bool:
        """Whether the plan in force serves the model, by nodes that are all there."""
        current, members = self._in_force(name), self._members()
        return current is not None and any(
            not readiness(pipeline, members).lost for pipeline in current.pipelines
        )

    def _in_force(self, name: str) -> ModelPlan | None:
        plan = self._sync.plan
        return next((model for model in plan.models if model.name == name), None) if plan else None

    async def _plan_model(self, name: str) -> ModelPlan:
        failure = self._failures.get(name)
        if failure is not None and trio.current_time() < failure[0] + RETRY_S:
            return failure[1]
        try:
            description = await self._models.describe(name)
        except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
            plan = ModelPlan(name=name, state="failed", reason=str(error)[:2000])
            self._failures = {name: (trio.current_time(), plan)}
            return plan
        plan = ModelPlan(
            name=name,
            fingerprint=description.fingerprint,
            layers=description.layers,
            context=description.context,
        )
        offers = self._offers()
        result = await trio.to_thread.run_sync(
            partial(
                plan_pipeline,
                _cost(description),
                offers,
                PLAN_SETTINGS,
                self._previous(name),
            )
        )
        if isinstance(result, Shortage):
            reason = "; ".join(filter(None, (result.reason, description.unsupported)))
            return msgspec.structs.replace(plan, state="waiting", reason=reason[:2000])
        stages = _stages(result)
        pipeline = PipelinePlan(pipeline_id(name, description.fingerprint, stages), stages)
        return msgspec.structs.replace(plan, pipelines=(pipeline,))

    def _offers(self) -> list[NodeOffer]:
        return [
            NodeOffer(
                id=member.record.id,
                memory=member.record.memory,
                tflops=member.record.device.tflops,
                bandwidth=member.record.device.bandwidth,
                max_layers=member.record.max_layers,
            )
            for member in self._members().values()
            if member.state in ("alive", "suspect") and member.record.device is not None
        ]

    def _previous(self, name: str) -> tuple[tuple[str, int, int], ...]:
        current = self._in_force(name)
        if current is None or not current.pipelines:
            return ()
        return tuple((s.node, s.start, s.end) for s in current.pipelines[0].stages)


def _cost(description: ModelDescription) -> ModelCost:
    return ModelCost(
        layer_bytes=description.layer_bytes,
        embedding_bytes=description.embedding_bytes,
        head_bytes=description.head_bytes,
        kv_bytes_per_token=description.kv_bytes_per_token,
        splits=description.splits,
        tied=description.tied,
    )


def _stages(allocation: Allocation) -> tuple[StagePlan, ...]:
    return tuple(
        StagePlan(node=stage.node, start=stage.start, end=stage.end, kv_bytes=stage.kv_bytes)
        for stage in allocation.stages
    )


def _describe_chain(model: ModelPlan) -> str:
    return " | ".join(
        " -> ".join(f"{stage.node[-6:]} [{stage.start}, {stage.end})" for stage in pipeline.stages)
        for pipeline in model.pipelines
    )
