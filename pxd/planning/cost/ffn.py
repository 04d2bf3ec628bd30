"""What works on each position of a layer by itself: a dense network, or experts."""

from collections.abc import Callable

import msgspec

from pxd.planning.cost.attention import Matrix, borrows_cache
from pxd.planning.cost.fields import Fields

_GATED = ("gate_proj", "up_proj", "down_proj")
_PLAIN = ("up_proj", "down_proj")


class FeedForward(msgspec.Struct, frozen=True, kw_only=True):
    """`matrices` meet every token; of the `total` experts, each `expert` large, `active` do."""

    matrices: tuple[Matrix, ...] = ()
    expert: tuple[Matrix, ...] = ()
    total: int = 0
    active: int = 0


def nothing(_: Fields) -> FeedForward:
    return FeedForward()


def dense(fields: Fields) -> FeedForward:
    width = fields.maybe("intermediate_size_mlp") or _width(fields)
    if borrows_cache(fields) and fields.flag("use_double_wide_mlp"):
        width *= 2
    return FeedForward(matrices=_matrices(fields, "mlp", width) + _per_layer_input(fields))


def mixture(fields: Fields) -> FeedForward:
    """Routed experts, the router, and the experts that all tokens share."""
    total, active = fields.count("num_experts"), fields.count("num_experts_per_tok")
    if active > total:
        raise ValueError("config.json says more num_experts_per_tok than num_experts")
    width = fields.maybe("moe_intermediate_size") or _width(fields)
    shared = fields.maybe("shared_expert_intermediate_size")
    if shared is None:
        shared = (fields.maybe("n_shared_experts") or 0) * width
    matrices = [Matrix("mlp.gate", fields.count("hidden_size") * total)]
    if shared:
        matrices += _matrices(fields, "mlp.shared_experts", shared)
    if fields.flag("enable_moe_block"):  # Gemma 4 has a dense network beside the experts
        matrices += dense(fields).matrices
    expert = _matrices(fields, "mlp.experts", width)
    return FeedForward(matrices=tuple(matrices), expert=expert, total=total, active=active)


def _matrices(fields: Fields, path: str, width: int) -> tuple[Matrix, ...]:
    names = _GATED if fields.count("mlp_matrices", 3) == 3 else _PLAIN
    size = fields.count("hidden_size") * width
    return tuple(Matrix(f"{path}.{name}", size) for name in names)


def _per_layer_input(fields: Fields) -> tuple[Matrix, ...]:
    """Gemma's way for an embedding of the token's own to enter every layer."""
    size = fields.maybe("hidden_size_per_layer_input") or 0
    matrix = Matrix("per_layer_input", 2 * fields.count("hidden_size") * size)
    return (matrix,) if size else ()


def _width(fields: Fields) -> int:
    plain = fields.count("mlp_matrices", 3) == 2
    usual = 4 * fields.count("hidden_size") if plain else None
    width = fields.count("intermediate_size", usual) // fields.count("intermediate_parts", 1)
    if not fields.flag("block_auto_adjust_ff_dim"):
        return width
    # LFM2 states the width that its network would have without a gate.
    multiplier = fields.raw("block_ffn_dim_multiplier")
    if not isinstance(multiplier, int | float) or not 0 < multiplier <= 64:
        multiplier = 1.0
    multiple = fields.count("block_multiple_of", 256)
    return -(-int(int(2 * width / 3) * multiplier) // multiple) * multiple


FEED_FORWARDS: dict[str, Callable[[Fields], FeedForward]] = {
    "dense": dense,
    "experts": mixture,
    "none": nothing,
}
