"""From one plan to the next without a pause: what is replaced goes on until others stand in for it.

Pipelines that the new plan has no use for *retire*: they stay in the plan, requests ride them while
no other pipeline is ready, and then the few that still run may end there. They go at once where
their nodes have no memory for both, or where the others need nothing loaded but their very stages.
"""

import math
from collections.abc import Iterable, Sequence

import msgspec

from pxd.cluster.claims import Claims, claims_of, room, stage_bytes
from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan, StagePlan
from pxd.cluster.records import ModelChoice
from pxd.planning.model import PlanSettings
from pxd.serving.readiness import Members, is_loaded, readiness, stage_report

GRACE_S = 30.0
"""How long requests may go on where they are before they are moved to another pipeline."""
LEAVE_GRACE_S = 10.0
"""The same where a node waits to leave."""
NEWS_S = 2.0
"""Until all nodes know that a model is stopped, and its heads have told of their requests since. An
answer of it has no other pipeline to go on in."""
STOP_GRACE_S = 60.0
"""How long requests to a model that was stopped may go on before they end with an error."""


class Handover:
    """Remembers since when pipelines are of no more use."""

    def __init__(self, settings: PlanSettings) -> None:
        self._settings = settings
        self._done: dict[str, float] = {}

    def arrange(
        self, models: Sequence[ModelPlan], before: Plan | None, members: Members, now: float
    ) -> tuple[list[ModelPlan], float]:
        """`models` with what retires, and after how many seconds to look again at the latest.

        Of `models`, those that are outgoing or stopped are left out once nothing of them is left.
        """
        old = {model.name: model for model in (before.models if before else ())}
        claims = sum((claims_of(model, model.pipelines) for model in models), Claims())
        retiring: dict[str, list[PipelinePlan]] = {}
        done: dict[str, float] = {}
        rest = math.inf
        for model in models:
            kept = retiring.setdefault(model.name, [])
            for pipeline in _candidates(model, old.get(model.name), members):
                more = claims + claims_of(old[model.name], [pipeline])
                if not self._fits(more, pipeline, members):
                    continue
                if is_replaced(model, members):
                    began = done[pipeline.id] = self._done.get(pipeline.id, now)
                    left = began + _grace(model, pipeline, members) - now
                    news = began + NEWS_S - now if model.state == "stopped" else 0.0
                    if left <= 0 or (news <= 0 and _has_ended(pipeline, members)):
                        continue
                    rest = min(rest, news if news > 0 else left)
                kept.append(pipeline)
                claims = more
        self._done = done
        arranged = []
        for model in models:
            spares, claims = self._spares(model, claims, members)
            lines = tuple(retiring[model.name])
            if lines or model.state not in ("outgoing", "stopped"):
                arranged.append(msgspec.structs.replace(model, spares=spares, retiring=lines))
        return arranged, rest

    def _fits(self, claims: Claims, pipeline: PipelinePlan, members: Members) -> bool:
        return all(
            claims[stage.node] <= room(members[stage.node].record.memory, self._settings)
            for stage in pipeline.stages
        )

    def _spares(
        self, model: ModelPlan, claims: Claims, members: Members
    ) -> tuple[tuple[StagePlan, ...], Claims]:
        """Those that there is room for beside what retires; the others come when that is gone."""
        kept = []
        for spare in model.spares:
            size = Claims({spare.node: stage_bytes(model, spare)})
            member = members.get(spare.node)
            offered = member.record.memory if member else 0
            if (claims + size)[spare.node] <= room(offered, self._settings):
                kept.append(spare)
                claims = claims + size
        return tuple(kept), claims


def is_replaced(model: ModelPlan, members: Members) -> bool:
    """Whether the model needs its retiring pipelines no more, as far as can be told now."""
    if model.state in ("outgoing", "stopped"):
        return model.state == "stopped"
    states = [readiness(pipeline, members) for pipeline in model.pipelines]
    return any(state.ready for state in states) and all(
        state.ready or "failed" in state.states for state in states
    )


def _grace(model: ModelPlan, pipeline: PipelinePlan, members: Members) -> float:
    if model.state == "stopped":
        return STOP_GRACE_S
    nodes = (members.get(stage.node) for stage in pipeline.stages)
    return LEAVE_GRACE_S if any(node and node.record.leaving for node in nodes) else GRACE_S


def _has_ended(pipeline: PipelinePlan, members: Members) -> bool:
    head = members.get(pipeline.head)
    report = stage_report(head.record, pipeline.id) if head else None
    return report is not None and report.requests == 0


def _candidates(
    model: ModelPlan, old: ModelPlan | None, members: Members
) -> Iterable[PipelinePlan]:
    """Pipelines of the plan before that still serve and have no place in the new one."""
    if old is None or old.fingerprint != model.fingerprint:
        return
    current = {pipeline.id for pipeline in model.pipelines}
    at_once = _needed_to_start(model, old)
    for pipeline in old.pipelines:
        goes = pipeline.id not in current and not at_once & set(pipeline.chain)
        if goes and is_loaded(pipeline, members):
            yield pipeline
    for pipeline in old.retiring:
        state = readiness(pipeline, members)
        gone = state.lost or "failed" in state.states
        if pipeline.id not in current and not gone:
            yield pipeline


def _needed_to_start(model: ModelPlan, old: ModelPlan) -> set[tuple[str, int, int]]:
    """Stages with which new pipelines can begin at once, without anything loaded; else none."""
    stages = [stage for pipeline in old.pipelines for stage in pipeline.stages]
    held = {(stage.node, stage.start, stage.end) for stage in (*stages, *old.spares)}
    before = {pipeline.id for pipeline in old.pipelines}
    new = {
        link for pipeline in model.pipelines if pipeline.id not in before for link in pipeline.chain
    }
    return new if new <= held else set()


def end_unwanted(
    unwanted: Sequence[ModelPlan],
    choice: ModelChoice,
    made: Sequence[ModelPlan],
    alone: Sequence[ModelPlan],
    members: Members,
) -> list[ModelPlan]:
    """The models of `made` and what becomes of those that are not chosen any more.

    A model that was chosen to be replaced goes on until the others serve. `alone` are the same
    models as `made`, planned as if there were no unwanted ones: where one of them has room only
    there, all unwanted ones have to go first.
    """
    crowded = [
        free.pipelines != () and not model.pipelines
        for model, free in zip(made, alone, strict=True)
    ]
    settled = any(_serves(model, members) for model in made) and not any(
        _is_loading(model, members) for model in made
    )
    models = []
    for model, must_wait in zip(made, crowded, strict=True):
        if must_wait:
            others = ", ".join(old.name for old in unwanted)
            reason = f"it waits for the memory of {others}, which has to end first"
            model = msgspec.structs.replace(model, reason=reason[:2000])
        models.append(model)
    for old in unwanted:
        stays = old.name in choice.outgoing and old.state != "stopped"
        stop = not stays or settled or any(crowded)
        models.append(
            msgspec.structs.replace(
                old,
                pipelines=(),
                spares=(),
                retiring=(),
                state="stopped" if stop else "outgoing",
                reason="" if stop else f"it goes once {', '.join(choice.names)} is served",
            )
        )
    return models


def _serves(model: ModelPlan, members: Members) -> bool:
    return any(readiness(pipeline, members).ready for pipeline in model.pipelines)


def _is_loading(model: ModelPlan, members: Members) -> bool:
    states = [readiness(pipeline, members) for pipeline in model.pipelines]
    failed = all("failed" in state.states for state in states)
    return bool(states) and not failed and not any(state.ready for state in states)
