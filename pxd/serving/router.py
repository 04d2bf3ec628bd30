"""Picks the pipeline that a request is to ride."""

from collections.abc import Mapping
from types import MappingProxyType

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.serving.choice import called
from pxd.serving.readiness import Members, readiness
from pxd.serving.requests import NotReady, UnknownModel


def find_model(plan: Plan | None, name: str | None) -> ModelPlan:
    """The plan's model of that name; a directory or hub id may be named by its last part alone.

    None means the first that has pipelines. Raises `UnknownModel`, or `NotReady` without any.
    """
    if plan is None:
        raise NotReady("the cluster has no plan yet; it is still being formed")
    if not plan.models:
        raise NotReady("no model is chosen to be served; `pxd models use NAME` chooses one")
    if name is None:
        going_on = [model for model in plan.models if model.state != "stopped"] or plan.models
        return next((model for model in going_on if model.all_pipelines), going_on[0])
    found = called(name, (model.name for model in plan.models))
    for model in plan.models:
        if model.name == found:
            return model
    raise UnknownModel(f"model {name!r} is not served here; {_served(plan)}")


def refuse_stopped(model: ModelPlan) -> None:
    """For new requests: those that a model has may end. Raises `UnknownModel`."""
    if model.state == "stopped":
        raise UnknownModel(f"model {model.name!r} was stopped and takes no new requests")


def _served(plan: Plan) -> str:
    names = ", ".join(model.name for model in plan.models if model.state != "stopped")
    return f"this cluster serves {names or 'no other model either'}"


def pick_pipeline(
    model: ModelPlan, members: Members, failures: Mapping[str, int] = MappingProxyType({})
) -> PipelinePlan:
    """The ready pipeline whose head holds the fewest requests. Raises `NotReady` with the reason.

    One with a node that does not answer just now, that failed the request more often (`failures` by
    pipeline id), or that retires, comes after all others. Ties go to the first in the plan, which
    is the same on every node.
    """
    if not model.all_pipelines:
        raise NotReady(f"model {model.name} is not being served: {model.reason}", retry_after=10)
    reasons = []
    best: tuple[tuple[bool, int, bool, int], PipelinePlan] | None = None
    for place, pipeline in enumerate(model.all_pipelines):
        state = readiness(pipeline, members)
        if not state.ready:
            reasons.append(state.reason)
            continue
        shaky = any(members[stage.node].state != "alive" for stage in pipeline.stages)
        retires = place >= len(model.pipelines)
        head = members[pipeline.head].record
        load = head.running + head.waiting
        rank = (shaky, failures.get(pipeline.id, 0), retires, load)
        if best is None or rank < best[0]:
            best = rank, pipeline
    if best is None:
        raise NotReady(f"model {model.name} is not ready: {' | '.join(reasons)}")
    return best[1]
