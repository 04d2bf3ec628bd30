"""What the stages of a plan take of the nodes' memory, so that several models can share nodes."""

import math
from collections import Counter
from collections.abc import Iterable

from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan
from pxd.planning.capacity import ends_bytes
from pxd.planning.model import PlanSettings

Claims = Counter[str]
"""Bytes by node."""


def stage_bytes(model: ModelPlan, stage: StagePlan) -> int:
    """Weights and KV caches; only the latter where the plan does not tell the model's sizes."""
    if model.basis is None:
        return stage.kv_bytes
    cost = model.basis.inputs.model
    ends = ends_bytes(cost, embedding=stage.start == 0, head=stage.end == cost.layers)
    weights = sum(cost.layer_bytes[stage.start : stage.end]) + ends
    offers = model.basis.inputs.offers
    expansion = next((offer.expansion for offer in offers if offer.id == stage.node), 1.0)
    return math.ceil(weights * expansion) + stage.kv_bytes


def claims_of(
    model: ModelPlan, pipelines: Iterable[PipelinePlan], spares: Iterable[StagePlan] = ()
) -> Claims:
    """What some of the model's pipelines and spares take."""
    claims = Claims()
    for pipeline in pipelines:
        for stage in pipeline.stages:
            claims[stage.node] += stage_bytes(model, stage)
    for spare in spares:
        claims[spare.node] += stage_bytes(model, spare)
    return claims


def all_claims(models: Iterable[ModelPlan]) -> Claims:
    """What all stages of some models take."""
    found = (claims_of(model, model.all_pipelines, model.spares) for model in models)
    return sum(found, Claims())


def room(memory: int, settings: PlanSettings) -> int:
    """Bytes that the stages on a node may take together."""
    return math.floor(memory * (settings.weight_share + settings.kv_share))
