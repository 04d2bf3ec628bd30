"""What goes into a plan and what comes out of it. Memory in bytes, compute in TFLOP/s."""

from typing import Annotated

import msgspec

NodeId = Annotated[str, msgspec.Meta(min_length=1, max_length=128)]
Size = Annotated[int, msgspec.Meta(ge=0, le=1 << 60)]
Speed = Annotated[float, msgspec.Meta(ge=0, le=1e12)]
Seconds = Annotated[float, msgspec.Meta(ge=0, le=1e9)]
Layer = Annotated[int, msgspec.Meta(ge=0, le=4096)]
Expansion = Annotated[float, msgspec.Meta(ge=1, le=1000)]
PerLayer = Annotated[tuple[Size, ...], msgspec.Meta(max_length=4096)]


class Measured(msgspec.Struct, frozen=True, order=True):
    """How fast a node was at layers [start, end) of the model, in seconds.

    `decode_s` is one decode step of one request, `prefill_s` one prompt token within a long chunk;
    0 means not measured. Both are for the stage alone, from a step's arrival to its result.
    """

    start: Layer
    end: Layer
    decode_s: Seconds = 0.0
    prefill_s: Seconds = 0.0


class NodeOffer(msgspec.Struct, frozen=True):
    """What a node offers to models: `memory` in bytes for weights and KV caches together.

    `tflops` (fp16) and `bandwidth` (GB/s of memory) are totals of the whole node, whatever number
    of devices it has; 0 means not known. One that is `slow` is slower than usual just now, and all
    figures are of now. `taken` is how many bytes, of weights and KV caches, the stages of other
    models have on it. Weights take `expansion` times their stored bytes on it.
    """

    id: NodeId
    memory: Size
    tflops: Speed = 0.0
    bandwidth: Speed = 0.0
    max_layers: Size | None = None
    measured: Measured | None = None
    taken: Size = 0
    slow: bool = False
    expansion: Expansion = 1.0


class Experts(msgspec.Struct, frozen=True):
    """The routed experts of one layer: `active` of `total` per token, `bytes_each` of weights."""

    total: Size
    active: Size
    bytes_each: Size


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """Exact sizes of a model; layers need not be equal.

    `head_bytes` counts a tied projection too, since a last stage that is not the first holds its
    own copy; a stage that has both ends of a `tied` model holds that copy once. `splits` are the
    layer indices at which a pipeline may be cut.

    What speed depends on is optional, one entry per layer where it is not empty: `layer_flops`
    per token (two per active weight), `attention_flops` per token and attended position,
    `windows` in positions (0: attends to all), `state_bytes` of a request whatever its length, and
    `experts` (None: the layer is dense). `head_flops` is per token; `compute_scale` is how much
    faster the model's number format multiplies than fp16. `hidden_size` and `activation_bytes` are
    what a position takes on the wire. `expansion` is how many times their bytes weights take as
    plain numbers, on nodes that cannot compute with quantised ones.
    """

    layer_bytes: PerLayer
    embedding_bytes: Size
    head_bytes: Size
    tied: bool
    kv_bytes_per_token: PerLayer
    splits: PerLayer
    layer_flops: PerLayer = ()
    attention_flops: PerLayer = ()
    windows: PerLayer = ()
    state_bytes: PerLayer = ()
    experts: Annotated[tuple[Experts | None, ...], msgspec.Meta(max_length=4096)] = ()
    head_flops: Size = 0
    compute_scale: Annotated[float, msgspec.Meta(ge=0.001, le=1000)] = 1.0
    hidden_size: Size = 0
    activation_bytes: Annotated[int, msgspec.Meta(ge=1, le=16)] = 2
    context: Size = 0
    expansion: Expansion = 1.0

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

    @property
    def is_consistent(self) -> bool:
        """Whether there are layers, and one entry for each of them wherever there are any."""
        optional = (
            self.layer_flops,
            self.attention_flops,
            self.windows,
            self.state_bytes,
            self.experts,
        )
        return (
            self.layers > 0
            and len(self.kv_bytes_per_token) == self.layers
            and all(len(figures) in (0, self.layers) for figures in optional)
        )

    @property
    def total_bytes(self) -> int:
        """Bytes of all weights, on one node."""
        return sum(self.layer_bytes) + self.ends_bytes

    @property
    def ends_bytes(self) -> int:
        """Bytes of both ends on one node."""
        if self.tied:
            return max(self.embedding_bytes, self.head_bytes)
        return self.embedding_bytes + self.head_bytes


class PlanSettings(msgspec.Struct, frozen=True, kw_only=True):
    """How an offer's memory is divided. What both shares leave over is room for activations.

    The shares have no defaults on purpose: every capacity depends on them, so whoever plans says
    what they are. A stage must have KV room for at least `min_kv_tokens` positions of its layers.
    """

    weight_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    kv_share: Annotated[float, msgspec.Meta(gt=0, le=1)]
    min_kv_tokens: Size = 1024

    def __post_init__(self) -> None:
        if not (self.weight_share > 0 and self.kv_share > 0 and self.min_kv_tokens >= 0):
            raise ValueError("both shares must be positive and min_kv_tokens not negative")
        if self.weight_share + self.kv_share > 1:
            raise ValueError("weight_share and kv_share together exceed the memory of a node")


class StageAllocation(msgspec.Struct, frozen=True):
    """Layers [start, end) on `node`.

    `weight_bytes` is what they take; `kv_bytes` is the node's whole KV share, enough for
    `kv_tokens` positions of these layers (0 when they keep no KV at all).
    """

    node: str
    start: int
    end: int
    weight_bytes: int
    kv_bytes: int
    kv_tokens: int


Chain = Annotated[tuple[tuple[NodeId, Layer, Layer], ...], msgspec.Meta(max_length=1024)]
"""(node, start layer, end layer) of each stage of a pipeline, in order."""


class Allocation(msgspec.Struct, frozen=True):
    """One pipeline: stages that cover [0, L) exactly, in order, each on a node of its own."""

    stages: tuple[StageAllocation, ...]

    @property
    def chain(self) -> Chain:
        """(node, start, end) per stage: what `replan` takes as previous."""
        return tuple((stage.node, stage.start, stage.end) for stage in self.stages)

    @property
    def kv_tokens(self) -> int:
        """Positions of KV that every stage has room for; 0 when the model keeps no KV."""
        return min((stage.kv_tokens for stage in self.stages if stage.kv_tokens), default=0)


class Shortage(msgspec.Struct, frozen=True):
    """Why no pipeline is possible. The figures are bytes of offered memory, shares included.

    `missing_layers` is how many layers no node takes when memory is used as well as possible.
    `reason` is a sentence for people.
    """

    needed_bytes: int
    offered_bytes: int
    missing_bytes: int
    missing_layers: int
    reason: str
