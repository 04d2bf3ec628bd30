"""What plans follow from: the records of the cluster, in the planner's terms."""

from collections.abc import Iterator

import msgspec

from pxd.cluster.claims import Claims
from pxd.cluster.plans import ModelPlan, PipelinePlan
from pxd.cluster.records import NodeRecord, StageReport
from pxd.planning.links import Link
from pxd.planning.model import Measured, ModelCost, NodeOffer, PlanSettings
from pxd.planning.result import Basis, PlanInputs, Spare
from pxd.serving.readiness import Members

# What both leave over is room for activations and the library's own buffers.
PLAN_SETTINGS = PlanSettings(weight_share=0.75, kv_share=0.2)

PROBE_S = 0.0013
"""What a membership probe takes on top of the network: both daemons have to wake up."""
LEAST_RTT_S = 1e-5

Key = frozenset[tuple[str, int, int | None, bool]]


def inputs_of(name: str, cost: ModelCost, members: Members) -> PlanInputs:
    """A plan's inputs as the records are now, figures that nodes measured included."""
    present = [record for record in _present(members) if name not in unfit_for(record)]
    there = {record.id for record in present}
    links = (link for record in present for link in _links(record) if link.b in there)
    return PlanInputs(
        model=cost,
        offers=tuple(_offer(record, name) for record in present),
        settings=PLAN_SETTINGS,
        links=tuple(sorted(links)),
    )


def basis_of(
    inputs: PlanInputs, current: ModelPlan | None, *, rebalance: bool, second: bool = False
) -> Basis:
    """`current` is the plan in force of the same model, if there is one."""
    if current is None:
        return Basis(inputs=inputs, rebalance=rebalance)
    # A model that was about to go, or a node that was drained, may be wanted again.
    pipelines = current.pipelines or _apart(current.retiring)
    chains = tuple(pipeline.chain for pipeline in pipelines)
    spares = tuple(Spare(stage.node, stage.start, stage.end) for stage in current.spares)
    return Basis(inputs=inputs, previous=chains, spares=spares, rebalance=rebalance, second=second)


def _apart(pipelines: tuple[PipelinePlan, ...]) -> tuple[PipelinePlan, ...]:
    """As many of them, the first ones first, as share no node."""
    used: set[str] = set()
    kept = []
    for pipeline in pipelines:
        nodes = {stage.node for stage in pipeline.stages}
        if not nodes & used:
            used |= nodes
            kept.append(pipeline)
    return tuple(kept)


def beside(inputs: PlanInputs, claims: Claims) -> PlanInputs:
    """The same inputs where other models' stages take `claims` of the nodes' memory."""
    offers = (msgspec.structs.replace(offer, taken=claims[offer.id]) for offer in inputs.offers)
    return msgspec.structs.replace(inputs, offers=tuple(offers))


def offers_key(inputs: PlanInputs) -> Key:
    """Who is there with what, and who is slow: while that stays, a plan needs no second look from
    scratch."""
    return frozenset((o.id, o.memory, o.max_layers, o.slow) for o in inputs.offers)


def taking_part(members: Members) -> frozenset[tuple[object, ...]]:
    """Who takes part in plans with what, for which models; while that stays, so do the keys of all
    inputs."""
    return frozenset(
        (
            record.id,
            record.memory,
            record.max_layers,
            record.slow > 0,
            tuple(unfit.model for unfit in record.unfit),
        )
        for record in _present(members)
    )


def unfit_for(record: NodeRecord) -> dict[str, str]:
    """The models that the node leaves to others, and why."""
    return {unfit.model: unfit.reason for unfit in record.unfit}


def left_out(name: str, members: Members) -> str:
    """Which nodes take no part in a model's plan because they keep failing at it, in words."""
    found = [
        f"{record.name} is left out: {unfit_for(record)[name]}"
        for record in _present(members)
        if name in unfit_for(record)
    ]
    return "; ".join(found)


def _present(members: Members) -> Iterator[NodeRecord]:
    for _, member in sorted(members.items()):
        record = member.record
        there = member.state in ("alive", "suspect")
        away = record.leaving or record.drained
        if there and record.device is not None and not away:
            yield record


def _offer(record: NodeRecord, model: str) -> NodeOffer:
    device = record.device
    assert device is not None, "_present leaves out nodes that have not measured themselves"
    report = next((r for r in record.stages if r.model == model and r.decode_s > 0), None)
    # What a stage has measured since the node became slow says so already.
    slow = max(1.0, record.slow if report is None else report.slow)
    return NodeOffer(
        id=record.id,
        memory=record.memory,
        tflops=device.tflops / slow,
        bandwidth=device.bandwidth / slow,
        max_layers=record.max_layers,
        measured=_measured(report, slow) if report is not None else None,
        slow=record.slow > 0,
    )


def _measured(report: StageReport, slow: float) -> Measured:
    return Measured(report.start, report.end, report.decode_s * slow, report.prefill_s * slow)


def _links(record: NodeRecord) -> Iterator[Link]:
    return (
        Link(record.id, link.peer, max(LEAST_RTT_S, link.rtt - PROBE_S), link.bandwidth)
        for link in record.links
    )
