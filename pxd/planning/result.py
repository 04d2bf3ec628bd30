"""What a plan for a whole cluster says."""

from typing import Annotated, Literal

import msgspec

from pxd.planning.links import Link
from pxd.planning.model import (
    Allocation,
    Chain,
    Layer,
    ModelCost,
    NodeId,
    NodeOffer,
    PlanSettings,
    Shortage,
)

Strategy = Literal["auto", "greedy", "dp"]


class Workload(msgspec.Struct, frozen=True, kw_only=True):
    """The requests a plan is made for: `prompt` and `output` in tokens.

    A pipeline never runs more than `max_requests` at once. `token_limit_s` is the latency bound: a
    pipeline whose time per token for one request is above it counts for less.
    """

    prompt: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 1024
    output: Annotated[int, msgspec.Meta(ge=1, le=1 << 40)] = 256
    max_requests: Annotated[int, msgspec.Meta(ge=1, le=1024)] = 32
    token_limit_s: Annotated[float, msgspec.Meta(gt=0, le=1e9)] = 0.5


class StageEstimate(msgspec.Struct, frozen=True):
    """Seconds of one stage: a decode step of one request, the prompt, and the way to the next.

    `hop_s` is the way of one position to the next stage; from the last it is the token's way home.
    """

    decode_s: float
    prefill_s: float
    hop_s: float


class PipelineEstimate(msgspec.Struct, frozen=True):
    """What one pipeline is expected to do.

    `ttft_s` is the time to the first token of the workload's prompt and `token_s` the time per
    token after that, both for one request alone; `tokens_per_s` is the peak with `requests` at
    once. `bottleneck` is the index of the stage that bounds the peak.
    """

    ttft_s: float
    token_s: float
    tokens_per_s: float
    requests: int
    bottleneck: int
    stages: tuple[StageEstimate, ...]


class Spare(msgspec.Struct, frozen=True):
    """A node that no pipeline needs.

    Where it has a range it can stand in for a stage at once; start = end = 0 means that the node
    can hold nothing of this model that would be of use.
    """

    node: NodeId
    start: Layer
    end: Layer


class ClusterPlan(msgspec.Struct, frozen=True, kw_only=True):
    """Node-disjoint pipelines, one estimate for each, and the nodes left over.

    `objective` is the sum of the pipelines' peak tokens/s, with those that break the latency bound
    counted for less: what `auto` maximises, but for a share that it gives up rather than have one
    pipeline alone. Without pipelines `shortage` says why.
    """

    pipelines: tuple[Allocation, ...] = ()
    estimates: tuple[PipelineEstimate, ...] = ()
    spares: tuple[Spare, ...] = ()
    objective: float = 0.0
    shortage: Shortage | None = None


class PlanInputs(msgspec.Struct, frozen=True, kw_only=True):
    """Everything a plan depends on, so that anybody can make it again."""

    model: ModelCost
    offers: Annotated[tuple[NodeOffer, ...], msgspec.Meta(max_length=1024)]
    settings: PlanSettings
    links: Annotated[tuple[Link, ...], msgspec.Meta(max_length=65536)] = ()
    workload: Workload = Workload()


class Basis(msgspec.Struct, frozen=True, kw_only=True):
    """All that a plan follows from: its inputs, what was there before, and what may change.

    `previous` are the pipelines before and `spares` the ranges that other nodes hold ready; with
    `rebalance` a plan from scratch is taken if it gains enough, and with `second` one that has a
    second pipeline if that costs little.
    """

    inputs: PlanInputs
    previous: Annotated[tuple[Chain, ...], msgspec.Meta(max_length=1024)] = ()
    spares: Annotated[tuple[Spare, ...], msgspec.Meta(max_length=1024)] = ()
    rebalance: bool = False
    second: bool = False
