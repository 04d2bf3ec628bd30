"""Whether a pipeline of the plan can take requests, from what its nodes say of themselves."""

import msgspec

from pxd.cluster.adoption import Members as Members
from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """`states` has one word per stage. `lost` is set when a node is gone, so waiting is vain until
    there is another plan. `kv_tokens` is the capacity of the smallest stage once `ready`, and
    `prefix_cache` says whether all of them can begin a request with what another one has left;
    `tier_slots` is the size of the smallest second tier, in blocks. `trims` says whether all can
    take positions back, and `decode_s` what all take together for one token, 0 if not known."""

    ready: bool
    lost: bool
    states: tuple[str, ...]
    reason: str
    kv_tokens: int
    prefix_cache: bool
    tier_slots: int
    trims: bool
    decode_s: float


def stage_report(record: NodeRecord, pipeline: str) -> StageReport | None:
    return next((report for report in record.stages if report.pipeline == pipeline), None)


def _stage_state(
    stage: StagePlan, pipeline: str, members: Members
) -> tuple[str, str, StageReport | None]:
    """Return (state word, reason where it is not ready, report where it is)."""
    member = members.get(stage.node)
    if member is None:
        return "dead", f"node {stage.node} is gone", None
    name = member.record.name
    if member.state in ("dead", "left"):
        return member.state, f"{name} is {member.state}", None
    report = stage_report(member.record, pipeline)
    layers = f"layers [{stage.start}, {stage.end})"
    if report is None:
        return "planned", f"{name} has not begun to load {layers} yet", None
    if report.state == "loading":
        doing = f"loading {layers}" + (f" ({report.reason})" if report.reason else "")
        return "loading", f"{name} is {doing}, {report.progress:.0%} done", None
    if report.state != "ready":
        return report.state, f"{name}, {layers}: {report.reason}", None
    return "ready", "", report


def readiness(pipeline: PipelinePlan, members: Members) -> Readiness:
    stages = [_stage_state(stage, pipeline.id, members) for stage in pipeline.stages]
    states = tuple(state for state, *_ in stages)
    reports = [report for *_, report in stages if report is not None]
    decode_s = [report.decode_s for report in reports]
    ready = len(reports) == len(stages)
    return Readiness(
        ready=ready,
        lost=any(state in ("dead", "left") for state in states),
        states=states,
        reason="; ".join(reason for _, reason, _ in stages if reason),
        kv_tokens=min(report.kv_tokens for report in reports) if ready else 0,
        prefix_cache=ready and all(report.prefix_cache for report in reports),
        tier_slots=min(report.tier_slots for report in reports) if ready else 0,
        trims=ready and all(report.trims for report in reports),
        decode_s=sum(decode_s) if ready and all(decode_s) else 0.0,
    )


def is_loaded(pipeline: PipelinePlan, members: Members) -> bool:
    """Whether nothing of it is yet to be loaded or lost; executors may be starting again."""
    return {"ready", "restarting"} >= set(readiness(pipeline, members).states)


def is_coming(pipeline: PipelinePlan, members: Members) -> bool:
    """Whether some stage of it is yet to be loaded."""
    return not {"planned", "loading"}.isdisjoint(readiness(pipeline, members).states)


def is_stranded(model: ModelPlan, members: Members) -> bool:
    """Whether nothing of the model is served, and nodes that the plan needs for it are gone."""
    states = [readiness(pipeline, members) for pipeline in model.all_pipelines]
    return any(state.lost for state in states) and not any(state.ready for state in states)
