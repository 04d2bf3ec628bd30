"""The cost model of Parallax v0.1.2 (`reference/planning.md`), figure by figure.

Kept beside `config` because public vectors are defined by it. What it gets wrong (FLOPs
of experts, layers that differ) is corrected in `to_model_cost` as far as its fields tell.
"""

import math
from typing import Annotated, Any

import msgspec

from pxd.planning.cost.config import within_bounds
from pxd.planning.cost.formats import quant_speedup
from pxd.planning.model import Experts, ModelCost

Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 24)]
Vocabulary = Annotated[int, msgspec.Meta(ge=1, le=1 << 26)]
Layers = Annotated[int, msgspec.Meta(ge=1, le=2000)]
_ELEMENT_BYTES = (1 / 16, 16)
_LOAD_MS = 0.05


class CostFields(msgspec.Struct, frozen=True, kw_only=True):
    """A model of equal layers by its dimensions; sizes of elements in bytes, 0.5 for 4 bits.

    `read_cost_fields` checks ranges. Without `head_size` it is hidden / heads.
    """

    hidden_dim: Size
    intermediate_dim: Size
    num_attention_heads: Size
    num_kv_heads: Size
    vocab_size: Vocabulary
    num_layers: Layers
    head_size: Size | None = None
    ffn_num_projections: Annotated[int, msgspec.Meta(ge=1, le=16)] = 3
    num_local_experts: Size | None = None
    num_experts_per_tok: Size | None = None
    moe_intermediate_dim: Size | None = None
    tie_embedding: bool = False
    param_bytes_per_element: float = 2
    mlx_param_bytes_per_element: float = 2
    cache_bytes_per_element: float = 2
    embedding_bytes_per_element: float = 2
    qk_nope_head_dim: Size | None = None
    qk_rope_head_dim: Size | None = None

    def __post_init__(self) -> None:
        for name in self.__struct_fields__:
            value = getattr(self, name)
            low, high = _ELEMENT_BYTES
            if name.endswith("bytes_per_element") and not low <= value <= high:
                raise ValueError(f"{name} must be between {low} and {high}")
        if self.num_experts_per_tok and not self.num_local_experts:
            raise ValueError("num_experts_per_tok needs num_local_experts")
        if self.num_local_experts and (self.num_experts_per_tok or 1) > self.num_local_experts:
            raise ValueError("num_experts_per_tok is more than num_local_experts")
        if self.head_size is None and self.num_attention_heads > self.hidden_dim:
            raise ValueError("num_attention_heads is more than hidden_dim")

    @property
    def value_size(self) -> int:
        return self.head_size or self.hidden_dim // self.num_attention_heads

    @property
    def key_size(self) -> int:
        if self.qk_nope_head_dim is not None and self.qk_rope_head_dim is not None:
            return self.qk_nope_head_dim + self.qk_rope_head_dim
        return self.value_size

    @property
    def q_dim(self) -> int:
        return self.num_attention_heads * self.value_size

    @property
    def k_dim(self) -> int:
        return self.num_kv_heads * self.key_size

    @property
    def v_dim(self) -> int:
        return self.num_kv_heads * self.value_size

    @property
    def ffn_dim(self) -> int:
        return self.moe_intermediate_dim or self.intermediate_dim

    @property
    def mlx_bit_factor(self) -> float:
        """How much larger layers are on an `mlx` device."""
        return self.mlx_param_bytes_per_element / self.param_bytes_per_element


def read_cost_fields(data: Any) -> CostFields:
    """Fields from a JSON object; those it does not know are ignored.

    Raises ValueError, in one line that names the field.
    """
    try:
        return msgspec.convert(data, CostFields)
    except msgspec.ValidationError as error:
        what, _, where = str(error).partition(" - at `$")
        field = where.strip("`.")
        raise ValueError(f"{field}: {what[0].lower()}{what[1:]}" if field else what) from error


def embedding_bytes(fields: CostFields) -> int:
    return round(fields.embedding_bytes_per_element * fields.vocab_size * fields.hidden_dim)


def kv_bytes_per_token(fields: CostFields) -> int:
    """Of one layer."""
    return math.ceil(fields.cache_bytes_per_element * (fields.k_dim + fields.v_dim))


def attention_bytes(fields: CostFields) -> float:
    projections = 2 * fields.q_dim + fields.k_dim + fields.v_dim
    return fields.param_bytes_per_element * fields.hidden_dim * projections


def ffn_bytes(fields: CostFields) -> float:
    """Of one expert, or of the whole where there are none."""
    elements = fields.ffn_num_projections * fields.hidden_dim * fields.ffn_dim
    return fields.param_bytes_per_element * elements


def expected_experts(fields: CostFields, tokens: int) -> int:
    """How many different experts `tokens` tokens use; 1 where there are none to choose from."""
    total, active = fields.num_local_experts, fields.num_experts_per_tok
    if not total or not active:
        return 1
    return int(total * (1 - (1 - active / total) ** tokens))


def layer_bytes(fields: CostFields) -> int:
    """What one layer takes in memory."""
    return round(attention_bytes(fields) + ffn_bytes(fields) * (fields.num_local_experts or 1))


def layer_io_bytes(fields: CostFields, batch: int, target: int, source: int) -> int:
    """What one layer reads for `target` tokens each of `batch` sequences `source` long."""
    experts = expected_experts(fields, batch * target)
    cache = kv_bytes_per_token(fields) * batch * source
    return round(ffn_bytes(fields) * experts + cache + attention_bytes(fields))


def layer_flops(fields: CostFields, batch: int, target: int, source: int) -> int:
    """As the reference counts: each token pays for every expert that the batch uses."""
    hidden = fields.hidden_dim
    projections = 4 * hidden**2 + 2 * hidden * (fields.k_dim + fields.v_dim)
    ffn = 2 * fields.ffn_num_projections * hidden * fields.intermediate_dim
    ffn *= expected_experts(fields, batch * target)
    return batch * target * (projections + 4 * hidden * source + ffn)


def head_flops(fields: CostFields, target: int = 1) -> int:
    return 2 * target * fields.hidden_dim * fields.vocab_size


class ReferenceStage(msgspec.Struct, frozen=True, kw_only=True):
    """What the reference knows of a node with layers: fp16 TFLOP/s, GB/s, requests, latency in ms.

    `measured_ms` per layer beats the roofline. `sequence` is the longest that it serves.
    """

    layers: int
    embedding: bool
    head: bool
    tflops: float
    bandwidth: float
    requests: int = 0
    max_requests: int = 16
    sequence: int = 4096
    measured_ms: float | None = None


def layer_latency_ms(fields: CostFields, stage: ReferenceStage) -> float:
    """Mean latency of one of the stage's layers in ms, the model's ends shared out among them.

    Infinite when the stage is overloaded. The reference adds it once per node, not per layer.
    """
    if stage.requests >= stage.max_requests:
        return math.inf
    if stage.measured_ms is not None:
        return stage.measured_ms + _LOAD_MS * stage.requests / stage.max_requests
    speed = quant_speedup(fields.param_bytes_per_element) * stage.tflops * 1e9

    def roofline(flops: int, size: int) -> float:
        return max(flops / speed, size / (stage.bandwidth * 1e6))

    shape = (stage.requests, 1, stage.sequence)
    layer = roofline(layer_flops(fields, *shape), layer_io_bytes(fields, *shape))
    ends = roofline(
        head_flops(fields) * stage.head, embedding_bytes(fields) * (stage.embedding + stage.head)
    )
    return (stage.layers * layer + ends) / stage.layers


def to_model_cost(fields: CostFields, *, mlx: bool = False) -> ModelCost:
    """The same model for pxd's planner: its sizes as above, its FLOPs those of active experts.

    `mlx` says that the nodes hold the weights as `mlx_param_bytes_per_element` tells. Raises
    ValueError for a model that is larger than any.
    """
    layers, hidden = fields.num_layers, fields.hidden_dim
    factor = fields.mlx_bit_factor if mlx else 1.0
    element_bytes = fields.param_bytes_per_element * factor
    ends = embedding_bytes(fields)
    experts = None
    if fields.num_local_experts:
        experts = Experts(
            total=fields.num_local_experts,
            active=fields.num_experts_per_tok or fields.num_local_experts,
            bytes_each=round(ffn_bytes(fields) * factor),
        )
    ffn = fields.ffn_num_projections * fields.ffn_dim * (experts.active if experts else 1)
    weights = hidden * (2 * fields.q_dim + fields.k_dim + fields.v_dim + ffn)
    per_position = 2 * fields.num_attention_heads * (fields.key_size + fields.value_size)
    cost = ModelCost(
        layer_bytes=(round(layer_bytes(fields) * factor),) * layers,
        embedding_bytes=ends,
        head_bytes=ends,
        tied=fields.tie_embedding,
        kv_bytes_per_token=(kv_bytes_per_token(fields),) * layers,
        splits=tuple(range(1, layers)),
        layer_flops=(2 * weights,) * layers,
        attention_flops=(per_position,) * layers,
        experts=(experts,) * layers,
        head_flops=head_flops(fields),
        compute_scale=quant_speedup(element_bytes),
        hidden_size=hidden,
    )
    return within_bounds(cost)
