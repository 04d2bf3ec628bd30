"""The cluster as this node sees it, in the shape of `pxd status --json`."""

from collections.abc import Iterable, Mapping

import msgspec

from pxd.cluster.members import Member
from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.cluster.records import KvBlocks, NodeRecord
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.p2p.host import Route
from pxd.p2p.refusals import Refusal
from pxd.planning.result import PlanInputs
from pxd.serving.basis import inputs_of
from pxd.serving.forecast import forecast
from pxd.serving.readiness import Members, readiness, stage_report
from pxd.serving.status import (
    KvView,
    ModelState,
    ModelView,
    NodeView,
    PipelineStageView,
    SpareView,
    StageView,
)

GIB = 1 << 30

TURNED_AWAY_S = 180.0
"""For how long a refusal is worth telling; peers that refused are tried again within half of it."""


def _stages(record: NodeRecord) -> list[StageView]:
    return [
        StageView(
            model=report.model,
            pipeline=report.pipeline,
            start=report.start,
            end=report.end,
            state=report.state,
            progress=round(report.progress, 3),
            restarts=report.restarts,
            reason=report.reason,
            wire_dtype=report.coding or "native",
            hangs=report.hangs,
            out_of_memory=report.out_of_memory,
            not_finite=report.not_finite,
            slow=report.slow,
            kv_held=report.kv_held,
            kv_kept=report.kv_kept,
        )
        for report in record.stages
    ]


def _device(record: NodeRecord) -> str:
    if record.device is None:
        return "being measured"
    return f"{record.device.kind}: {record.device.name}" if record.device.name else "cpu"


def node_views(
    members: Mapping[str, Member],
    now: float,
    *,
    own_id: str,
    routes: Mapping[str, Route | None],
    bandwidths: Mapping[str, float],
    refused: str,
) -> list[NodeView]:
    """By name. `routes` to those who are connected; `bandwidths` in GB/s, as far as they are
    measured. `refused` says why nobody lets this node in."""
    views = [
        _node_view(
            member.record,
            state=member.state,
            since=now - member.since,
            rtt=member.rtt,
            connected=peer in routes or peer == own_id,
            route=routes.get(peer),
            bandwidth=bandwidths.get(peer),
            refused=refused if peer == own_id else "",
        )
        for peer, member in members.items()
    ]
    return sorted(views, key=lambda node: (node.name, node.id))


def _node_view(
    record: NodeRecord,
    *,
    state: str,
    since: float,
    rtt: float | None,
    connected: bool,
    route: Route | None,
    bandwidth: float | None,
    refused: str,
) -> NodeView:
    """`since` in seconds of age, `rtt` in seconds, `bandwidth` in GB/s. A gone node's stages are
    gone with it."""
    gone = state in ("dead", "left")
    return NodeView(
        id=record.id,
        name=record.name,
        state=state,  # type: ignore[arg-type]
        device=_device(record),
        memory_gib=round(record.memory / GIB, 6),
        stages=[] if gone else _stages(record),
        problem="; ".join(filter(None, (*_troubles(record), record.problem or refused))),
        since=round(since, 3),
        rtt_ms=None if rtt is None else round(rtt * 1000, 3),
        connected=connected,
        path=route.path if route else "",
        through=route.relay if route else "",
        relay=record.relay,
        version=record.pxd,
        tflops=record.device.tflops if record.device else 0.0,
        bandwidth_gbs=record.device.bandwidth if record.device else 0.0,
        running=record.running,
        waiting=record.waiting,
        link_gbs=None if bandwidth is None else round(bandwidth, 6),
        drained=record.drained,
        leaving=record.leaving and not gone,
        unfit=[unfit.model for unfit in record.unfit],
        slow=record.slow,
        files=[] if gone else [held.name for held in record.models],
    )


def _troubles(record: NodeRecord) -> list[str]:
    """What keeps a node from doing its part, and what to do about it."""
    found = [
        f"it leaves {each.model} to others, as far as they can serve it: {each.reason}, or at once "
        f"with `pxd resume {record.name}`; its log says more"
        for each in record.unfit
    ]
    if record.slow and not any(report.slow for report in record.stages):
        found.append(
            f"it was {record.slow:g} times slower than usual, and for a while plans count on that"
        )
    return found


def turned_away(refusals: Iterable[Refusal], now: float) -> str:
    """Why members lately did not let this node in, and what to do; empty where none refused it.

    `now` in seconds since the epoch.
    """
    recent = [
        each.message
        for each in refusals
        if each.message.startswith("refused by") and now - each.at < TURNED_AWAY_S
    ]
    return recent[-1] if recent else ""


def _model_state(model: ModelPlan, members: Members) -> tuple[ModelState, str]:
    if model.state == "stopped":
        return "stopping", model.reason
    states = [readiness(pipeline, members) for pipeline in model.all_pipelines]
    if any(state.ready for state in states):
        return "serving", model.reason
    if not model.pipelines:
        state: ModelState = "failed" if model.state == "failed" else "waiting"
        return state, model.reason
    reason = " | ".join(state.reason for state in states)
    if all("failed" in state.states for state in states):
        return "failed", reason
    return "loading", reason


def model_views(plan: Plan | None, members: Members) -> list[ModelView]:
    views = []
    for model in plan.models if plan else ():
        state, reason = _model_state(model, members)
        views.append(
            ModelView(
                name=model.name,
                state=state,
                reason=reason,
                layers=model.layers,
                pipelines=[_stage_views(pipeline, members) for pipeline in model.pipelines],
                figures=forecast(model, members),
                kv=[_kv_view(pipeline, members) for pipeline in model.pipelines],
                spares=[
                    SpareView(node=spare.node, start=spare.start, end=spare.end)
                    for spare in model.spares
                ],
                retiring=[_stage_views(pipeline, members) for pipeline in model.retiring],
            )
        )
    return views


def _stage_views(pipeline: PipelinePlan, members: Members) -> list[PipelineStageView]:
    words = readiness(pipeline, members).states
    return [
        PipelineStageView(node=stage.node, start=stage.start, end=stage.end, state=word)
        for stage, word in zip(pipeline.stages, words, strict=True)
    ]


def _kv_view(pipeline: PipelinePlan, members: Members) -> KvView:
    head = members.get(pipeline.head)
    kv = None
    if head is not None and head.state not in ("dead", "left"):
        report = stage_report(head.record, pipeline.id)
        kv = report.kv if report is not None else None
    kv = kv or KvBlocks(0, 0, 0)
    return KvView(total=kv.total, free=kv.free, cached=kv.cached, block_tokens=BLOCK_TOKENS)


class Planning(msgspec.Struct, frozen=True):
    """What a plan of the first model would be made from now. `names` are the nodes' names by id."""

    model: str
    inputs: PlanInputs
    names: dict[str, str]


def planning(plan: Plan | None, members: Members) -> Planning | None:
    """None while there is no plan, or none that could be made."""
    model = next((model for model in plan.models if model.basis), None) if plan else None
    if model is None or model.basis is None:
        return None
    inputs = inputs_of(model.name, model.basis.inputs.model, members)
    names = {offer.id: members[offer.id].record.name for offer in inputs.offers}
    return Planning(model.name, inputs, names)
