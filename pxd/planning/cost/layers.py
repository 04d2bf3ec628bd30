"""Which layer of a model is of which kind."""

from itertools import cycle, islice
from typing import NamedTuple

from pxd.planning.cost.fields import MAX_LAYERS, Fields

_KINDS = {
    "full_attention": "full",
    "attention": "full",
    "indexed_attention": "full",
    "sliding_attention": "window",
    "chunked_attention": "window",
    "linear_attention": "linear",
    "mamba": "mamba",
    "conv": "conv",
    "recurrent": "recurrent",
    "hybrid": "hybrid",
}


class LayerKind(NamedTuple):
    """`mixer` is a key of `attention.MIXERS`, `ffn` one of `cost_ffn.FEED_FORWARDS`."""

    mixer: str
    ffn: str


# Nemotron-H's layers are either a mixer or a feed-forward network, written as letters or names.
_SINGLE = {
    "M": LayerKind("mamba", "none"),
    "*": LayerKind("full", "none"),
    "-": LayerKind("none", "dense"),
    "E": LayerKind("none", "experts"),
}
_LETTERS = {"mamba": "M", "attention": "*", "mlp": "-", "moe": "E"}


def layer_kinds(fields: Fields, layers: int) -> tuple[LayerKind, ...]:
    """The kind of each layer. Raises ValueError."""
    letters = _letters(fields)
    if letters:
        if len(letters) != layers or set(letters) - set(_SINGLE):
            raise ValueError("config.json says a hybrid_override_pattern unlike its layers")
        return tuple(_SINGLE[letter] for letter in letters)
    mixers = _mixers(fields, layers)
    if not fields.flag("ffn", True):
        return tuple(LayerKind(mixer, "none") for mixer in mixers)
    experts = _expert_layers(fields, layers)
    return tuple(
        LayerKind(mixer, "experts" if layer in experts else "dense")
        for layer, mixer in enumerate(mixers)
    )


def _letters(fields: Fields) -> str:
    pattern = fields.raw("hybrid_override_pattern")
    if isinstance(pattern, str):
        return pattern
    names = fields.names("layer_types")
    single = {"moe", "mlp"} & set(names)
    return "".join(_LETTERS.get(name, "?") for name in names) if single else ""


def _mixers(fields: Fields, layers: int) -> tuple[str, ...]:
    names = fields.names("layer_types")
    if names:
        unknown = next((name for name in names if name not in _KINDS), None)
        if unknown is not None:
            raise ValueError(f"config.json says layer_types with {unknown[:40]!r}, an unknown one")
        return tuple(_KINDS[name] for name in islice(cycle(names), layers))
    same = fields.raw("mixer")
    if same in ("mamba", "hybrid", "rwkv"):
        return (same,) * layers
    others, full = _rare_attention(fields, layers)
    if full is None:
        others, full = "window", set(range(layers)) - _windowed(fields, layers)
    return tuple("full" if layer in full else others for layer in range(layers))


def _rare_attention(fields: Fields, layers: int) -> tuple[str, set[int] | None]:
    """What most layers are, and the few that attend; None where that is not how it is said."""
    kimi = Fields(fields.mapping("linear_attn_config")).indices("full_attn_layers")
    if kimi is not None:
        return "linear", {layer - 1 for layer in kimi}
    listed = fields.indices("attn_layer_indices")
    if listed is not None:
        return "conv" if fields.maybe("conv_L_cache") else "mamba", set(listed)
    if fields.maybe("attn_layer_period"):
        return "mamba", _periodic(fields, "attn_layer", layers)
    interval = fields.maybe("full_attention_interval")
    if interval:
        return "linear", {layer for layer in range(layers) if (layer + 1) % interval == 0}
    return "", None


def _periodic(fields: Fields, name: str, layers: int) -> set[int]:
    period, offset = fields.count(f"{name}_period"), fields.maybe(f"{name}_offset") or 0
    return {layer for layer in range(layers) if layer % period == offset}


def _windowed(fields: Fields, layers: int) -> set[int]:
    """Layers whose attention sees the last positions only."""
    everywhere = range(layers)
    # Qwen's configurations name a window even where it is off, which is also the default.
    by_switch = fields.maybe("max_window_layers") is not None
    if not fields.maybe("sliding_window") or not fields.flag("use_sliding_window", not by_switch):
        return set()
    pattern = fields.raw("sliding_window_pattern")
    if isinstance(pattern, str) and 0 < len(pattern) <= MAX_LAYERS:
        return {layer for layer in everywhere if pattern[layer % len(pattern)] == "L"}
    period = fields.maybe("sliding_window_pattern")
    if period:
        return {layer for layer in everywhere if (layer + 1) % period}
    first = fields.maybe("max_window_layers") or 0
    return {layer for layer in everywhere if layer >= first}


def _expert_layers(fields: Fields, layers: int) -> set[int]:
    """Layers with experts; the others of the model are dense."""
    # One expert is no choice: some configurations write dense models like that.
    if (fields.maybe("num_experts") or 0) <= 1:
        return set()
    everywhere = range(layers)
    kinds = fields.names("mlp_layer_types")
    if kinds:
        return {layer for layer, kind in enumerate(kinds) if kind == "sparse"}
    listed = fields.indices("moe_layers")
    if listed is not None:
        return set(listed)
    if isinstance(fields.raw("moe_layer_freq"), list):
        return {layer for layer in everywhere if fields.at(layer).maybe("moe_layer_freq")}
    if fields.maybe("expert_layer_period"):
        return _periodic(fields, "expert_layer", layers)
    step, frequency = fields.count("decoder_sparse_step", 1), fields.count("moe_layer_freq", 1)
    dense = fields.indices("mlp_only_layers") or frozenset()
    first = fields.maybe("first_k_dense_replace") or 0
    return {
        layer
        for layer in everywhere
        if layer >= first
        and layer not in dense
        and (layer + 1) % step == 0
        and layer % frequency == 0
    }
