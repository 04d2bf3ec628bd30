"""Finds the models and pipelines that a request may ride, and has a router choose among them."""

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.planning.routing.replicas import replica_in
from pxd.planning.routing.router import Candidate, Router, Wish
from pxd.serving.choice import called
from pxd.serving.readiness import Members, Readiness, readiness
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


def pipeline_states(model: ModelPlan, members: Members) -> list[Readiness]:
    """Of all its pipelines, in order. Raises `NotReady` with the reason if none is ready."""
    if not model.all_pipelines:
        raise NotReady(f"model {model.name} is not being served: {model.reason}", retry_after=10)
    states = [readiness(pipeline, members) for pipeline in model.all_pipelines]
    if not any(state.ready for state in states):
        reasons = " | ".join(state.reason for state in states)
        raise NotReady(f"model {model.name} is not ready: {reasons}")
    return states


def pick_pipeline(
    router: Router, model: ModelPlan, members: Members, wish: Wish, *, tokens: int, now: float
) -> PipelinePlan:
    """A ready pipeline for a request that may take `tokens` positions. Raises `NotReady`.

    `router` is this model's, and has to hear of it when the request has ended there.
    """
    candidates = _candidates(model, pipeline_states(model, members), members, tokens)
    chosen = router.choose(candidates, wish, now)
    return next(pipeline for pipeline in model.all_pipelines if pipeline.id == chosen)


def is_sound_elsewhere(
    router: Router, model: ModelPlan, members: Members, *, tokens: int, now: float
) -> bool:
    """Whether a request of `tokens` positions would get a pipeline all of whose nodes answer."""
    states = [readiness(pipeline, members) for pipeline in model.all_pipelines]
    return any(
        each.replica.healthy
        and each.fits
        and not each.shaky
        and router.circuit(each.id, now) != "open"
        for each in _candidates(model, states, members, tokens)
    )


def _candidates(
    model: ModelPlan, states: list[Readiness], members: Members, tokens: int
) -> list[Candidate]:
    kept = len(model.pipelines)
    return [
        _candidate(pipeline, state, members, tokens, retires=place >= kept)
        for place, (pipeline, state) in enumerate(zip(model.all_pipelines, states, strict=True))
    ]


def _candidate(
    pipeline: PipelinePlan, state: Readiness, members: Members, tokens: int, *, retires: bool
) -> Candidate:
    """A pipeline as its nodes' records tell of it."""
    load, tier, told = 0, 0, (0, 0)
    if state.ready:
        head = members[pipeline.head].record
        told, tier = (head.running, head.waiting), head.kv_tier
        load = sum(told)
    return Candidate(
        replica=replica_in(tier, pipeline.id, healthy=state.ready, queue_depth=load),
        told=told,
        fits=blocks_for(tokens) <= state.kv_tokens // BLOCK_TOKENS,
        shaky=state.ready and any(members[s.node].state != "alive" for s in pipeline.stages),
        retires=retires,
        caches=state.prefix_cache,
    )
