"""Picks the pipeline that a request is to ride."""

from collections.abc import Mapping
from types import MappingProxyType

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.serving.readiness import Members, readiness
from pxd.serving.requests import NotReady, UnknownModel


def find_model(plan: Plan | None, name: str | None) -> ModelPlan:
    """The plan's model of that name; a directory or hub id may be named by its last part alone.

    None means the only model there is. Raises `UnknownModel`, or `NotReady` without any plan.
    """
    if plan is None or not plan.models:
        raise NotReady("the cluster has no plan yet; it is still being formed")
    if name is None:
        return plan.models[0]
    for model in plan.models:
        if name == model.name:
            return model
    for model in plan.models:
        if name == model.name.rstrip("/").rpartition("/")[2]:
            return model
    served = ", ".join(model.name for model in plan.models)
    raise UnknownModel(f"model {name!r} is not served here; this cluster serves {served}")


def pick_pipeline(
    model: ModelPlan, members: Members, failures: Mapping[str, int] = MappingProxyType({})
) -> PipelinePlan:
    """The ready pipeline whose head holds the fewest requests. Raises `NotReady` with the reason.

    One with a node that does not answer just now, or that failed the request more often (`failures`
    by pipeline id), comes after all others. Ties go to the first in the plan, which is the same on
    every node.
    """
    if not model.pipelines:
        raise NotReady(f"model {model.name} is not being served: {model.reason}", retry_after=10)
    reasons = []
    best: tuple[tuple[bool, int, int], PipelinePlan] | None = None
    for pipeline in model.pipelines:
        state = readiness(pipeline, members)
        if not state.ready:
            reasons.append(state.reason)
            continue
        shaky = any(members[stage.node].state != "alive" for stage in pipeline.stages)
        head = members[pipeline.head].record
        rank = (shaky, failures.get(pipeline.id, 0), head.running + head.waiting)
        if best is None or rank < best[0]:
            best = rank, pipeline
    if best is None:
        raise NotReady(f"model {model.name} is not ready: {' | '.join(reasons)}")
    return best[1]
