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

    `before` is what the plan in force says of it, and `hint` what else a person should know where
    there is a shortage: why its layers cannot be spread at will, which nodes are left out.
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
    secured: list[ModelPlan | None] = [None] * len(orders)
    if len(orders) > 1:
        secured = _secured(orders, reserved)
    made: list[ModelPlan] = []
    for place, order in enumerate(orders):
        taken = reserved + all_claims(made) + all_claims(filter(None, secured[place + 1 :]))
        plan = _planned(order, taken, secured[place])
        if plan.state == "waiting" and taken and decide(order.basis).plan.pipelines:
            plan = _crowded_out(plan, [other.model.name for other in orders if other is not order])
        made.append(plan)
    return made


def _secured(orders: Sequence[Order], reserved: Claims) -> list[ModelPlan | None]:
    """What room is kept for: all pipelines that are there, and one for each model without any.

    Where they do not fit together, one pipeline each.
    """
    there = [_kept(order, reserved) for order in orders]
    for kept in (there, [plan and _with_first(plan) for plan in there]):
        found = list(kept)
        for place, order in enumerate(orders):
            if found[place] is None:
                plan = _planned(order, reserved + all_claims(filter(None, found)))
                found[place] = _with_first(plan) if plan.pipelines else None
        if None not in found:
            break
    return found


def _with_first(plan: ModelPlan) -> ModelPlan:
    return msgspec.structs.replace(plan, pipelines=plan.pipelines[:1], spares=())


def _kept(order: Order, reserved: Claims) -> ModelPlan | None:
    """The model with the pipelines that are there and can stay, as they are; None without any."""
    lines = order.before.all_pipelines if order.before else ()
    problem = Problem(beside(order.basis.inputs, reserved))
    there = [line for line in lines if line.chain in order.basis.previous]
    stay = tuple(line for line in there if is_served(problem, line.chain))
    plan = msgspec.structs.replace(order.model, basis=order.basis, pipelines=stay)
    return plan if stay else None


def _planned(order: Order, taken: Claims, secured: ModelPlan | None = None) -> ModelPlan:
    """The model with these claims of others; `secured` is what room was kept for."""
    previous = order.basis.previous
    if secured is not None:
        previous += tuple(p.chain for p in secured.pipelines if p.chain not in previous)
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
