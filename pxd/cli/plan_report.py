"""What `pxd plan` answers: the JSON that programs get, and all that is drawn for people."""

from typing import Literal

import msgspec

from pxd.planning.capacity import budget, layer_capacity
from pxd.planning.model import Allocation, NodeOffer
from pxd.planning.result import ClusterPlan, PipelineEstimate, PlanInputs, Strategy

_GIB = 1 << 30


class Stage(msgspec.Struct, frozen=True):
    node: str
    start: int
    end: int


class Leftover(msgspec.Struct, frozen=True):
    """A node that no pipeline needs; without a range it holds nothing that is of use."""

    node: str
    start: int | None
    end: int | None


class StageTimes(msgspec.Struct, frozen=True):
    node: str
    decode_ms: float
    prefill_ms: float
    hop_ms: float


class PipelineFigures(msgspec.Struct, frozen=True):
    """`bottleneck` is the id of a node. `tokens_per_s` is with `requests` at once."""

    ttft_ms: float
    token_ms: float
    tokens_per_s: float
    requests: int
    bottleneck: str
    stages: list[StageTimes]


class Predicted(msgspec.Struct, frozen=True):
    tokens_per_s: float
    objective: float
    pipelines: list[PipelineFigures]


class NodeFigures(msgspec.Struct, frozen=True):
    """`weight_gib` and `kv_gib` are the shares of the memory, `used_gib` what the plan takes.

    `capacity` is in layers, by what the node holds beside them.
    """

    id: str
    memory_gib: float
    weight_gib: float
    kv_gib: float
    used_gib: float
    capacity: dict[str, int]


class Candidate(msgspec.Struct, frozen=True):
    """What one more `machine` does; `like` is a node that it equals, if there is one.

    `machine` is empty where `like` says more than any name. `gain` is in tokens/s, and may be below
    zero where one pipeline becomes several; `missing_gib` is what is still missing if the model
    does not fit then.
    """

    machine: str
    like: str | None
    fits: bool
    tokens_per_s: float
    gain: float
    missing_gib: float | None
    pipelines: int


class OneMore(msgspec.Struct, frozen=True):
    """Best first; `skipped` says why there are none."""

    candidates: list[Candidate]
    skipped: str | None = None


class ModelFigures(msgspec.Struct, frozen=True):
    name: str
    layers: int
    weight_gib: float


class Settings(msgspec.Struct, frozen=True):
    """`strategy` is "water_fill_only" where the cluster file gives the order of the nodes."""

    strategy: Literal["auto", "greedy", "dp", "water_fill_only"]
    param_ratio: float
    kv_ratio: float
    prompt_tokens: int
    output_tokens: int


class Report(msgspec.Struct, frozen=True):
    model: ModelFigures
    settings: Settings
    pipelines: list[list[Stage]]
    leftovers: list[Leftover]
    predicted: Predicted
    nodes: list[NodeFigures]
    one_more: OneMore
    missing_gib: float | None
    reason: str | None


def report(
    name: str,
    inputs: PlanInputs,
    plan: ClusterPlan,
    one_more: OneMore,
    strategy: Strategy | Literal["water_fill_only"],
) -> Report:
    shortage = plan.shortage
    model = inputs.model
    return Report(
        model=ModelFigures(name, model.layers, model.total_bytes / _GIB),
        settings=Settings(
            strategy=strategy,
            param_ratio=inputs.settings.weight_share,
            kv_ratio=inputs.settings.kv_share,
            prompt_tokens=inputs.workload.prompt,
            output_tokens=inputs.workload.output,
        ),
        pipelines=[
            [Stage(stage.node, stage.start, stage.end) for stage in pipeline.stages]
            for pipeline in plan.pipelines
        ],
        leftovers=[
            Leftover(spare.node, spare.start, spare.end)
            if spare.end > spare.start
            else Leftover(spare.node, None, None)
            for spare in plan.spares
        ],
        predicted=Predicted(
            tokens_per_s=tokens_per_s(plan),
            objective=plan.objective,
            pipelines=[
                _figures(pipeline, estimate)
                for pipeline, estimate in zip(plan.pipelines, plan.estimates, strict=True)
            ],
        ),
        nodes=_nodes(inputs, plan),
        one_more=one_more,
        missing_gib=None if shortage is None else shortage.missing_bytes / _GIB,
        reason=None if shortage is None else shortage.reason,
    )


def tokens_per_s(plan: ClusterPlan) -> float:
    """The peak of all pipelines together."""
    return sum(estimate.tokens_per_s for estimate in plan.estimates)


def _figures(pipeline: Allocation, estimate: PipelineEstimate) -> PipelineFigures:
    return PipelineFigures(
        ttft_ms=estimate.ttft_s * 1e3,
        token_ms=estimate.token_s * 1e3,
        tokens_per_s=estimate.tokens_per_s,
        requests=estimate.requests,
        bottleneck=pipeline.stages[estimate.bottleneck].node,
        stages=[
            StageTimes(stage.node, times.decode_s * 1e3, times.prefill_s * 1e3, times.hop_s * 1e3)
            for stage, times in zip(pipeline.stages, estimate.stages, strict=True)
        ],
    )


def _nodes(inputs: PlanInputs, plan: ClusterPlan) -> list[NodeFigures]:
    used = {
        stage.node: stage.weight_bytes + stage.kv_bytes
        for pipeline in plan.pipelines
        for stage in pipeline.stages
    }
    found = []
    for offer in inputs.offers:
        room = budget(offer, inputs.model, inputs.settings)
        found.append(
            NodeFigures(
                id=offer.id,
                memory_gib=offer.memory / _GIB,
                weight_gib=room.weights / _GIB,
                kv_gib=room.kv / _GIB,
                used_gib=used.get(offer.id, 0) / _GIB,
                capacity=_capacity(offer, room.weights, inputs),
            )
        )
    return found


def _capacity(offer: NodeOffer, weights: int, inputs: PlanInputs) -> dict[str, int]:
    ends = {
        "plain": (False, False),
        "embed": (True, False),
        "lm_head": (False, True),
        "embed+lm_head": (True, True),
    }
    layers = {
        name: layer_capacity(weights, inputs.model, embedding=embedding, head=head)
        for name, (embedding, head) in ends.items()
    }
    if offer.max_layers is None:
        return layers
    return {name: min(count, offer.max_layers) for name, count in layers.items()}
