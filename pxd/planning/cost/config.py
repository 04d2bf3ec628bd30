"""What a model costs: from its configuration, and exactly where the sizes of its tensors are known.

Layers are taken one by one: attention over all positions, over a window or over a compressed
latent, states of fixed size in its place, dense networks and experts in any order.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import msgspec

from pxd.planning.cost.attention import MIXERS
from pxd.planning.cost.ffn import FEED_FORWARDS
from pxd.planning.cost.fields import MAX_POSITIONS, Fields
from pxd.planning.cost.formats import Formats, quant_speedup
from pxd.planning.cost.layers import LayerKind, layer_kinds
from pxd.planning.cost.tensors import sort_tensors
from pxd.planning.model import Experts, ModelCost

MAX_TOTAL = 1 << 60


class _Layer(msgspec.Struct, frozen=True):
    """`flops` are two per active weight; `bits` is what those weights take, without scales. `plain`
    is the size that it had if nothing were quantised."""

    size: int
    kv: int
    flops: int
    bits: float
    plain: int
    attention_flops: int
    window: int
    state: int
    experts: Experts | None


def cost_from_config(
    config: Mapping[str, Any], tensors: Mapping[str, int] | None = None
) -> ModelCost:
    """The cost of the model that a Hugging Face config.json describes.

    `tensors` are the bytes of each tensor, by name: with them the sizes of layers, experts and
    ends are exact, and formulas serve for speed alone. KV caches are taken to be kept in the
    model's own number format. Raises ValueError, in one line that names the field.
    """
    fields = Fields(config)
    formats = Formats(fields)
    count, hidden = fields.count("num_hidden_layers"), fields.count("hidden_size")
    vocabulary = fields.count("vocab_size")
    own_inputs = count * (fields.maybe("hidden_size_per_layer_input") or 0)
    own_inputs *= fields.count("vocab_size_per_layer_input", vocabulary) + hidden
    layers = [
        _layer(fields.at(index), formats, index, kind)
        for index, kind in enumerate(layer_kinds(fields, count))
    ]
    element_bits = 2 * sum(layer.bits for layer in layers) / sum(layer.flops for layer in layers)
    cost = ModelCost(
        layer_bytes=tuple(layer.size for layer in layers),
        embedding_bytes=formats.of(None, "embed_tokens").size(vocabulary * hidden + own_inputs),
        head_bytes=formats.of(None, "lm_head").size(vocabulary * hidden),
        tied=fields.flag("tie_word_embeddings"),
        kv_bytes_per_token=tuple(layer.kv for layer in layers),
        splits=tuple(range(1, count)),
        layer_flops=tuple(layer.flops for layer in layers),
        attention_flops=tuple(layer.attention_flops for layer in layers),
        windows=tuple(layer.window for layer in layers),
        state_bytes=tuple(layer.state for layer in layers),
        experts=tuple(layer.experts for layer in layers),
        head_flops=2 * vocabulary * hidden,
        compute_scale=quant_speedup(element_bits / 8),
        hidden_size=hidden,
        activation_bytes=fields.element_bytes,
        context=fields.maybe("max_position_embeddings") or 0,
        expansion=_expansion(layers),
    )
    return within_bounds(_measured(cost, tensors) if tensors else cost)


def _expansion(layers: Sequence[_Layer]) -> float:
    stored = sum(layer.size for layer in layers)
    return max(1.0, sum(layer.plain for layer in layers) / max(1, stored))


def within_bounds(cost: ModelCost) -> ModelCost:
    """The same cost. Raises ValueError where no machine could ever hold or compute it."""
    sizes = (*cost.layer_bytes, cost.embedding_bytes, cost.head_bytes, *cost.state_bytes)
    flops = (*cost.layer_flops, *cost.attention_flops, cost.head_flops)
    if sum(sizes) > MAX_TOTAL or sum(flops) > MAX_TOTAL:
        raise ValueError("the configuration describes a model of more than 2^60 bytes or FLOPs")
    return cost


def _layer(fields: Fields, formats: Formats, index: int, kind: LayerKind) -> _Layer:
    mixer, ffn = MIXERS[kind.mixer](fields), FEED_FORWARDS[kind.ffn](fields)
    size = expert = weights = plain = 0
    bits = 0.0
    for matrix in mixer.matrices + ffn.matrices:
        found = formats.of(index, matrix.name)
        size += found.size(matrix.elements)
        plain += formats.plain.size(matrix.elements)
        weights += matrix.elements
        bits += matrix.elements * found.bits
    for matrix in ffn.expert:
        found = formats.of(index, matrix.name)
        expert += found.size(matrix.elements)
        plain += ffn.total * formats.plain.size(matrix.elements)
        weights += matrix.elements * ffn.active
        bits += matrix.elements * ffn.active * found.bits
    window = fields.count("sliding_window") if kind.mixer == "window" else 0
    return _Layer(
        size=size + ffn.total * expert,
        kv=mixer.kv * fields.element_bytes,
        flops=2 * weights,
        bits=bits,
        plain=plain,
        attention_flops=mixer.flops,
        # One that is never filled is none.
        window=window if window < _context(fields) else 0,
        state=mixer.state,
        experts=Experts(ffn.total, ffn.active, expert) if ffn.total else None,
    )


def _context(fields: Fields) -> int:
    """The longest sequence; the largest number there is where the configuration does not say."""
    return fields.maybe("max_position_embeddings") or MAX_POSITIONS


def _measured(cost: ModelCost, tensors: Mapping[str, int]) -> ModelCost:
    """The same model with the sizes of its real tensors."""
    sizes = sort_tensors(tensors, cost.layers)
    experts = tuple(
        Experts(one.total, one.active, size // one.total) if one and size else one
        for one, size in zip(cost.experts, sizes.experts, strict=True)
    )
    return msgspec.structs.replace(
        cost,
        layer_bytes=sizes.layers,
        embedding_bytes=sizes.embedding,
        head_bytes=sizes.head,
        tied=sizes.tied,
        experts=experts,
    )
