"""Whether a pipeline of the plan can take requests, from what its nodes say of themselves."""

import msgspec

from pxd.cluster.adoption import Members as Members
from pxd.cluster.plans import PipelinePlan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport


class Readiness(msgspec.Struct, frozen=True, kw_only=True):
    """`states` has one word per stage. `lost` is set when a node is gone, so waiting is vain until
    there is another plan. `kv_tokens` is the capacity of the smallest stage once `ready`, and
    `prefix_cache` says whether all of them can begin a request with what another one has left."""

    ready: bool
    lost: bool
    states: tuple[str, ...]
    reason: str
    kv_tokens: int
    prefix_cache: bool


def stage_report(record: NodeRecord, pipeline: str) -> StageReport | None:
    return next((report for report in record.stages if report.pipeline == pipeline), None)


def _stage_state(stage: StagePlan, pipeline: str, members: Members) -> tuple[str, str, int, bool]:
    """Return (state word, reason where it is not ready, kv tokens, prefix cache)."""
    member = members.get(stage.node)
    if member is None:
        return "dead", f"node {stage.node} is gone", 0, False
    name = member.record.name
    if member.state in ("dead", "left"):
        return member.state, f"{name} is {member.state}", 0, False
    report = stage_report(member.record, pipeline)
    layers = f"layers [{stage.start}, {stage.end})"
    if report is None:
        return "planned", f"{name} has not begun to load {layers} yet", 0, False
    if report.state == "loading":
        return "loading", f"{name} is loading {layers}, {report.progress:.0%} done", 0, False
    if report.state != "ready":
        return report.state, f"{name}, {layers}: {report.reason}", 0, False
    return "ready", "", report.kv_tokens, report.prefix_cache


def readiness(pipeline: PipelinePlan, members: Members) -> Readiness:
    stages = [_stage_state(stage, pipeline.id, members) for stage in pipeline.stages]
    states = tuple(state for state, *_ in stages)
    return Readiness(
        ready=all(state == "ready" for state in states),
        lost=any(state in ("dead", "left") for state in states),
        states=states,
        reason="; ".join(reason for _, reason, *_ in stages if reason),
        kv_tokens=min(tokens for _, _, tokens, _ in stages),
        prefix_cache=all(cached for *_, cached in stages),
    )
