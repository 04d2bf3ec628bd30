"""Reads a model's configuration, whatever its makers call things, and trusts nothing in it."""

from collections.abc import Mapping
from typing import Any

from pxd.planning.cost.families import FAMILIES

MAX_LAYERS = 2000
MAX_SIZE = 1 << 24
MAX_VOCABULARY = 1 << 26
MAX_POSITIONS = 1 << 40

_TEXT_CONFIGS = ("text_config", "llm_config", "language_config", "language_model")
# What counts may be called; the first name stands for all of them in errors.
_ALIASES: dict[str, tuple[str, ...]] = {
    "num_hidden_layers": ("n_layers", "n_layer", "num_layers", "num_transformer_layers"),
    "hidden_size": ("n_embd", "d_model", "model_dim", "dim"),
    "vocab_size": ("padded_vocab_size",),
    "num_attention_heads": ("n_head", "n_heads", "num_heads"),
    "num_key_value_heads": ("n_kv_heads", "num_kv_heads", "num_attention_groups"),
    "head_dim": ("kv_channels", "attention_head_dim"),
    "intermediate_size": ("block_ff_dim", "n_inner", "ffn_hidden_size", "ffn_dim", "d_ff"),
    "max_position_embeddings": (
        "n_positions", "max_seq_len", "seq_length", "max_sequence_length", "max_context_length",
        "model_max_length", "n_ctx",
    ),
    "sliding_window": ("attention_window_size", "attention_chunk_size"),
    "sliding_window_pattern": ("_sliding_window_pattern",),
    "layer_types": ("layers_block_type", "block_types", "_block_types"),
    "attn_layer_indices": ("full_attn_idxs",),
    "num_experts": ("n_routed_experts", "num_local_experts", "moe_num_experts"),
    "num_experts_per_tok": (
        "num_experts_per_token", "experts_per_token", "moe_k", "moe_topk", "top_k_experts",
    ),
    "moe_intermediate_size": ("moe_ffn_hidden_size", "expert_ffn_hidden_size"),
    "n_shared_experts": ("num_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
    "shared_expert_intermediate_size": (
        "moe_shared_expert_intermediate_size", "shared_intermediate_size",
    ),
    "first_k_dense_replace": ("num_dense_layers", "moe_layer_start_index"),
    "decoder_sparse_step": ("interleave_moe_layer_step", "moe_layer_interval"),
    "mamba_num_heads": ("mamba_n_heads",),
    "mamba_head_dim": ("mamba_d_head",),
    "mamba_state_size": ("mamba_d_state", "ssm_state_size", "state_size"),
    "mamba_conv_kernel": ("mamba_d_conv", "conv_kernel"),
    "mamba_expand": ("expand",),
    "mamba_dt_rank": ("time_step_rank",),
    "mamba_n_groups": ("n_groups",),
}  # fmt: skip
_LIMITS = {
    "num_hidden_layers": MAX_LAYERS,
    "vocab_size": MAX_VOCABULARY,
    "max_position_embeddings": MAX_POSITIONS,
    "sliding_window": MAX_POSITIONS,
}


class Fields:
    """A configuration: that of the language model, where it is nested, before the outer one.

    Behind both stands what the code of the model's family takes for granted. A list where a count
    belongs holds one per layer: `at` picks one, and `layer` is -1 before that. Every method raises
    ValueError, in one line that names the field, for what cannot be right.
    """

    def __init__(self, config: Mapping[str, Any], layer: int = -1) -> None:
        self._config = config
        self.layer = layer
        nested = (config.get(key) for key in _TEXT_CONFIGS)
        text: Mapping[str, Any] = next((one for one in nested if isinstance(one, Mapping)), {})
        families = [_name(source.get("model_type")) for source in (text, config)]
        self.family = families[0] or families[1]
        implied = next((FAMILIES[family] for family in families if family in FAMILIES), {})
        self._sources: tuple[Mapping[str, Any], ...] = (text, config, implied)

    def at(self, layer: int) -> "Fields":
        return Fields(self._config, layer)

    def raw(self, name: str) -> Any:
        """The first value that is not null, by any of the field's names."""
        return self._find(name)[1]

    def maybe(self, name: str) -> int | None:
        """A count of zero or more; None where the configuration does not say."""
        found, value = self._find(name)
        if isinstance(value, list | tuple) and self.layer >= 0:
            if self.layer >= len(value):
                raise ValueError(f"config.json lists {found} for {len(value)} layers only")
            value = value[self.layer]
        return None if value is None else _count(found, value, _LIMITS.get(name, MAX_SIZE))

    def count(self, name: str, default: int | None = None) -> int:
        """A count of one or more."""
        value = self.maybe(name)
        if value is None:
            value = default
        if value is None:
            raise ValueError(f"config.json does not say {name}")
        if value < 1:
            raise _wrong(self._find(name)[0], value)
        return value

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.raw(name)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise _wrong(name, value, "which is not true or false")
        return value

    def names(self, name: str) -> tuple[str, ...]:
        """A list of strings; empty where there is none."""
        found, value = self._find(name)
        if value is None:
            return ()
        if not _is_list(value) or not all(isinstance(item, str) for item in value):
            raise _wrong(found, value, "which is no list of names, one per layer")
        return tuple(value)

    def indices(self, name: str) -> frozenset[int] | None:
        """A list of layers; None where there is none."""
        found, value = self._find(name)
        if value is None:
            return None
        if not _is_list(value):
            raise _wrong(found, value, "which is no list of layers")
        return frozenset(_count(found, item, MAX_LAYERS) for item in value)

    def _find(self, name: str) -> tuple[str, Any]:
        for source in self._sources:
            for alias in (name, *_ALIASES.get(name, ())):
                value = source.get(alias)
                if value is not None:
                    return alias, value
        return name, None

    def mapping(self, name: str) -> Mapping[str, Any]:
        value = self.raw(name)
        if value is None:
            return {}
        if not isinstance(value, Mapping):
            raise _wrong(name, value, "which is no object")
        return value

    @property
    def element_bytes(self) -> int:
        """Bytes of a number that is not quantised."""
        dtype = _name(self.raw("dtype") or self.raw("torch_dtype")).removeprefix("torch.")
        return 4 if dtype == "float32" else 2


def _is_list(value: Any) -> bool:
    return isinstance(value, list | tuple) and len(value) <= 2 * MAX_LAYERS


def _count(name: str, value: Any, limit: int) -> int:
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    if not isinstance(value, int) or isinstance(value, bool):
        raise _wrong(name, value, "which is no whole number")
    if not 0 <= value <= limit:
        raise _wrong(name, value)
    return value


def _wrong(name: str, value: Any, why: str = "which cannot be right") -> ValueError:
    return ValueError(f"config.json says {name} = {_short(value)}, {why}")


def _name(value: Any) -> str:
    return value if isinstance(value, str) else ""


def _short(value: Any) -> str:
    """At most 40 characters; an int of many digits cannot even be printed."""
    if isinstance(value, int) and value.bit_length() > 100:
        return "a number of more than 30 digits"
    if isinstance(value, Mapping | list | tuple):
        return f"a {'object' if isinstance(value, Mapping) else 'list'} of {len(value)}"
    text = repr(value[:40] if isinstance(value, str) else value)
    return text[:40]
