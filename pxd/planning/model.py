"""What goes into a plan and what comes out of it. Memory in bytes, compute in TFLOP/s."""

import msgspec


class NodeOffer(msgspec.Struct, frozen=True):
    """What a node offers to models: `memory` in bytes for weights and KV caches together.

    `tflops` and `bandwidth` (GB/s) are totals of the whole node, whatever number of devices it has;
    0 means not measured.
    """

    id: str
    memory: int
    tflops: float = 0.0
    bandwidth: float = 0.0
    max_layers: int | None = None


class ModelCost(msgspec.Struct, frozen=True, kw_only=True):
    """Exact sizes of a model; layers need not be equal.

    `head_bytes` counts a tied projection too, since a last stage that is not the first holds its
    own copy; a stage that has both ends of a `tied` model holds that copy once. `splits` are the
    layer indices at which a pipeline may be cut.
    """

    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tied: bool
    kv_bytes_per_token: tuple[int, ...]
    splits: tuple[int, ...]

    @property
    def layers(self) -> int:
        return len(self.layer_bytes)

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

    weight_share: float
    kv_share: float
    min_kv_tokens: int = 1024

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


class Allocation(msgspec.Struct, frozen=True):
    """One pipeline: stages that cover [0, L) exactly, in order, each on a node of its own."""

    stages: tuple[StageAllocation, ...]

    @property
    def chain(self) -> tuple[tuple[str, int, int], ...]:
        """(node, start, end) per stage: what a later `plan_pipeline` takes as `previous`."""
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
