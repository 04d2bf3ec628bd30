"""Plans for several models on the same nodes.

Each model is planned in turn with what the others leave over. Before any of them gets a second
pipeline or a spare, every one gets its first: where it has one already, that one stays.
"""

from collections.abc import Sequence

import msgspec

from pxd.cluster.claims import Claims, all_claims, room, stage_bytes
from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan, pipeline_id
from pxd.planning.auto.problem import Problem
from pxd.planning.capacity import budget
from pxd.planning.model import Chain
from pxd.planning.replan import decide, is_served
from pxd.planning.result import Basis, ClusterPlan
from pxd.serving.basis import beside


class Order(msgspec.Struct, frozen=True):
    """A model to plan: what is known of it, and its basis as if it had the nodes for itself.

    `before` is what the plan in force says of it, and `hint` why its layers cannot be spread at
    will, for the reason of a shortage.
    """

    model: ModelPlan
    basis: Basis
    before: ModelPlan | None = None
    hint: str = ""


def plan_beside(orders: Sequence[Order], reserved: Claims) -> list[ModelPlan]:
    """One plan for each order, where `reserved` is not to be had.

    What the stages of all these models take of a node, together with `reserved`, is never more than
    it offers. A model alone with all memory is planned as `pxd.planning.replan.decide` says.
    """
    firsts: list[ModelPlan | None] = [None] * len(orders)
    if len(orders) > 1:
        firsts = _firsts(orders, reserved)
    made: list[ModelPlan] = []
    for place, order in enumerate(orders):
        later = [first for first in firsts[place + 1 :] if first is not None]
        taken = reserved + all_claims(made) + all_claims(later)
        plan = _planned(order, taken, firsts[place])
        if plan.state == "waiting" and taken and decide(order.basis).plan.pipelines:
            plan = _crowded_out(plan, [other.model.name for other in orders if other is not order])
        made.append(plan)
    return made


def _firsts(orders: Sequence[Order], reserved: Claims) -> list[ModelPlan | None]:
    """One pipeline for each model as far as there is room, and first those that are there."""
    found = [_kept(order, reserved) for order in orders]
    for place, order in enumerate(orders):
        if found[place] is None:
            plan = _planned(order, reserved + all_claims(filter(None, found)))
            if plan.pipelines:
                first = plan.pipelines[:1]
                found[place] = msgspec.structs.replace(plan, pipelines=first, spares=())
    return found


def _kept(order: Order, reserved: Claims) -> ModelPlan | None:
    """The model with the first pipeline that is there and can stay."""
    if order.before is None:
        return None
    problem = Problem(beside(order.basis.inputs, reserved))
    for chain in order.basis.previous:
        if is_served(problem, chain):
            plan = msgspec.structs.replace(order.model, basis=order.basis)
            pipeline = _Staging(plan, order.before, reserved).pipeline(chain)
            return msgspec.structs.replace(plan, pipelines=(pipeline,))
    return None


def _planned(order: Order, taken: Claims, first: ModelPlan | None = None) -> ModelPlan:
    """The model with these claims of others; `first` is the pipeline that room was kept for."""
    previous = order.basis.previous
    if first is not None:
        previous += tuple(p.chain for p in first.pipelines if p.chain not in previous)
    basis = msgspec.structs.replace(
        order.basis, inputs=beside(order.basis.inputs, taken), previous=previous
    )
    plan = msgspec.structs.replace(order.model, basis=basis)
    made = decide(basis).plan
    if made.shortage is not None:
        reason = "; ".join(filter(None, (made.shortage.reason, order.hint)))
        return msgspec.structs.replace(plan, state="waiting", reason=reason[:2000])
    return with_pipelines(plan, made, order.before, taken)


def with_pipelines(
    plan: ModelPlan, made: ClusterPlan, before: ModelPlan | None, taken: Claims
) -> ModelPlan:
    """The cluster's plan as stages that nodes can follow."""
    staging = _Staging(plan, before, taken)
    spares = tuple(
        staging.stage(spare.node, spare.start, spare.end)
        for spare in made.spares
        if spare.start < spare.end
    )
    pipelines = tuple(staging.pipeline(allocation.chain) for allocation in made.pipelines)
    return msgspec.structs.replace(plan, pipelines=pipelines, spares=spares)


class _Staging:
    """Says how many bytes the stages of a plan may spend on KV caches.

    One that is there keeps the caches that it has: it is not loaded anew because another model
    came, and so nobody may count on that memory.
    """

    def __init__(self, plan: ModelPlan, before: ModelPlan | None, taken: Claims) -> None:
        assert plan.basis is not None, "plans are made from a basis"
        self._plan, self._inputs, self._taken = plan, plan.basis.inputs, taken
        self._offers = {offer.id: offer for offer in beside(self._inputs, taken).offers}
        self._held: dict[tuple[str, int, int], int] = {}
        lines = before.all_pipelines if before else ()
        for stage in (
            *(s for line in lines for s in line.stages),
            *(before.spares if before else ()),
        ):
            layers = (stage.node, stage.start, stage.end)
            self._held[layers] = max(stage.kv_bytes, self._held.get(layers, 0))

    def pipeline(self, chain: Chain) -> PipelinePlan:
        stages = tuple(self.stage(*link) for link in chain)
        return PipelinePlan(pipeline_id(self._plan.name, self._plan.fingerprint, stages), stages)

    def stage(self, node: str, start: int, end: int) -> StagePlan:
        offer, settings = self._offers[node], self._inputs.settings
        stage = StagePlan(node, start, end, budget(offer, self._inputs.model, settings).kv)
        held = self._held.get((node, start, end), 0) if offer.taken else 0
        if held <= stage.kv_bytes:
            return stage
        weights = stage_bytes(self._plan, StagePlan(node, start, end))
        left = room(offer.memory, settings) - offer.taken - weights
        return msgspec.structs.replace(stage, kv_bytes=max(stage.kv_bytes, min(held, left)))


def _crowded_out(plan: ModelPlan, others: Sequence[str]) -> ModelPlan:
    """A model that there would be room for if it were not for the others."""
    named = ", ".join(others) or "models that are about to go"
    reason = (
        f"there is no room for it beside {named}: {plan.reason}. Start more nodes, or make room "
        f"with `pxd models stop NAME` or `pxd models use --only {plan.name}`"
    )
    return msgspec.structs.replace(plan, reason=reason[:2000])
