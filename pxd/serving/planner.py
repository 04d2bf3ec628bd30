"""Makes the cluster's plans while this node leads it."""

import logging
from collections.abc import Callable

import msgspec
import trio

from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan, pipeline_id
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.errors import ModelError
from pxd.planning.capacity import budget
from pxd.planning.model import Allocation
from pxd.planning.replan import decide
from pxd.planning.result import Basis, ClusterPlan
from pxd.serving.basis import Key, basis_of, inputs_of, offers_key
from pxd.serving.models import ModelSource
from pxd.serving.plansync import PlanSync
from pxd.serving.readiness import Members, readiness
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving.planner")

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
        self._balanced: tuple[int, str, Key] | None = None

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
        now, then = _without_basis(model), _without_basis(current)
        return now == then or now.state == then.state == "failed"

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
            cost = await self._models.cost(name)
        except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
            plan = ModelPlan(name=name, state="failed", reason=str(error)[:2000])
            self._failures = {name: (trio.current_time(), plan)}
            return plan
        inputs = inputs_of(name, cost, self._members())
        current = self._in_force(name)
        if current is not None and current.fingerprint != description.fingerprint:
            current = None
        key = offers_key(inputs)
        basis = basis_of(inputs, current, rebalance=self._may_rebalance(name, key, current))
        move = await trio.to_thread.run_sync(decide, basis)
        if basis.rebalance:
            self._balanced = (self._office().term, name, key)
        plan = ModelPlan(
            name=name,
            fingerprint=description.fingerprint,
            layers=description.layers,
            context=description.context,
            basis=basis,
        )
        if move.plan.shortage is not None:
            reasons = (move.plan.shortage.reason, description.unsupported)
            reason = "; ".join(filter(None, reasons))
            return msgspec.structs.replace(plan, state="waiting", reason=reason[:2000])
        return with_pipelines(plan, move.plan)

    def _may_rebalance(self, name: str, key: Key, current: ModelPlan | None) -> bool:
        """A look from scratch once for every set of nodes, when all that serves goes on anyway.

        A new leader takes over what its predecessor has looked at.
        """
        term = self._office().term
        if self._balanced is None or self._balanced[:2] != (term, name):
            basis = current.basis if current is not None else None
            seen = offers_key(basis.inputs) if basis is not None else frozenset()
            self._balanced = (term, name, seen)
        there = {node for node, _, _ in key}
        stages = [stage for p in current.pipelines for stage in p.stages] if current else []
        return key != self._balanced[2] and all(stage.node in there for stage in stages)


def with_pipelines(plan: ModelPlan, made: ClusterPlan) -> ModelPlan:
    """The cluster's plan as stages that nodes can follow."""
    kv_bytes = _kv_rooms(plan.basis)
    pipelines = []
    for allocation in made.pipelines:
        stages = _stages(allocation)
        pipelines.append(PipelinePlan(pipeline_id(plan.name, plan.fingerprint, stages), stages))
    spares = tuple(
        StagePlan(spare.node, spare.start, spare.end, kv_bytes[spare.node])
        for spare in made.spares
        if spare.start < spare.end
    )
    return msgspec.structs.replace(plan, pipelines=tuple(pipelines), spares=spares)


def _kv_rooms(basis: Basis | None) -> dict[str, int]:
    """Bytes that each node may spend on KV caches."""
    if basis is None:
        return {}
    model, settings = basis.inputs.model, basis.inputs.settings
    return {offer.id: budget(offer, model, settings).kv for offer in basis.inputs.offers}


def _without_basis(model: ModelPlan) -> ModelPlan:
    return msgspec.structs.replace(model, basis=None)


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
