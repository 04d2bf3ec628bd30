"""What mixes positions in a layer: attention, or a state of fixed size in its place.

Dimensions as the models' code has them in Hugging Face transformers and mlx-lm. Norms, biases and
convolutions over a few positions are left out: together below 0.1 % of a layer.
"""

from collections.abc import Callable

import msgspec

from pxd.planning.cost.fields import Fields

STATE_BYTES = 4
"""Recurrent states are kept in float32."""


class Matrix(msgspec.Struct, frozen=True):
    """Weights that every token meets; `name` is the path within the layer."""

    name: str
    elements: int


class Mixer(msgspec.Struct, frozen=True, kw_only=True):
    """`kv` are numbers kept per position, `state` bytes kept per request whatever its length.

    `flops` are per token and attended position.
    """

    matrices: tuple[Matrix, ...] = ()
    kv: int = 0
    state: int = 0
    flops: int = 0


def attention(fields: Fields) -> Mixer:
    """Grouped-query attention, or DeepSeek's latent attention where a `kv_lora_rank` says so."""
    if fields.maybe("kv_lora_rank"):
        return _latent(fields)
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    if not fields.maybe("head_dim") and heads > hidden:
        raise ValueError("config.json says more num_attention_heads than hidden_size")
    return _grouped(fields, fields.count("head_dim", max(1, hidden // heads)))


def full_attention(fields: Fields) -> Mixer:
    """Attention over all positions; Gemma 4 gives it larger heads than the windowed layers."""
    large = fields.maybe("global_head_dim")
    if not large:
        return attention(fields)
    if not fields.flag("attention_k_eq_v"):
        return _grouped(fields, large)
    return _grouped(fields, large, fields.maybe("num_global_key_value_heads"), own_values=False)


def borrows_cache(fields: Fields) -> bool:
    """Whether this is one of the last layers, which read what an earlier one keeps (Gemma)."""
    shared = fields.maybe("num_kv_shared_layers") or 0
    return fields.layer >= fields.count("num_hidden_layers") - shared > 0


def _grouped(
    fields: Fields, key: int, kv_heads: int | None = None, *, own_values: bool = True
) -> Mixer:
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    usual = heads if not fields.flag("multi_query") else 1
    kv_heads = kv_heads or fields.count("num_key_value_heads", usual)
    value = fields.count("v_head_dim", key)
    gates = 2 if fields.flag("attn_output_gate") else 1
    matrices = [
        Matrix("self_attn.q_proj", hidden * heads * key * gates),
        Matrix("self_attn.o_proj", hidden * heads * value),
    ]
    borrows = borrows_cache(fields)
    if not borrows:
        matrices.append(Matrix("self_attn.k_proj", hidden * kv_heads * key))
    if not borrows and own_values:
        matrices.append(Matrix("self_attn.v_proj", hidden * kv_heads * value))
    return Mixer(
        matrices=tuple(matrices),
        kv=0 if borrows else kv_heads * (key + value),
        flops=2 * heads * (key + value),
    )


def _latent(fields: Fields) -> Mixer:
    """MLA: what is kept of a position is one compressed latent and one rotary key.

    The FLOPs are those of prefill, which expands the latent; decoding is bound by memory anyway.
    """
    hidden, heads = fields.count("hidden_size"), fields.count("num_attention_heads")
    latent, rope = fields.count("kv_lora_rank"), fields.count("qk_rope_head_dim")
    nope, value = fields.count("qk_nope_head_dim"), fields.count("v_head_dim")
    queries = heads * (nope + rope)
    low_rank = fields.maybe("q_lora_rank")
    matrices = [
        Matrix("self_attn.kv_a_proj_with_mqa", hidden * (latent + rope)),
        Matrix("self_attn.kv_b_proj", latent * heads * (nope + value)),
        Matrix("self_attn.o_proj", hidden * heads * value),
    ]
    if low_rank:
        matrices.append(Matrix("self_attn.q_a_proj", hidden * low_rank))
        matrices.append(Matrix("self_attn.q_b_proj", low_rank * queries))
    else:
        matrices.append(Matrix("self_attn.q_proj", hidden * queries))
    index = fields.maybe("index_head_dim") or 0
    if index and low_rank:  # DeepSeek's sparse attention: a small one that picks positions
        index_heads = fields.count("index_n_heads")
        size = low_rank * index_heads * index + hidden * (index + index_heads)
        matrices.append(Matrix("self_attn.indexer", size))
    return Mixer(
        matrices=tuple(matrices),
        kv=latent + rope + index,
        flops=2 * heads * (nope + rope + value),
    )


def linear_attention(fields: Fields) -> Mixer:
    """A gated delta rule (Qwen3-Next, Kimi Linear): one matrix of state per value head."""
    hidden, item = fields.count("hidden_size"), fields.element_bytes
    kimi = Fields(fields.mapping("linear_attn_config"))
    if kimi.raw("head_dim") is not None:
        size, heads = kimi.count("head_dim"), kimi.count("num_attention_heads")
        width, kernel = heads * size, kimi.count("short_conv_kernel_size", 4)
        low_rank = 2 * (hidden + width) * size  # decay and output gate
        matrices = (
            Matrix("self_attn.qkvo_proj", 4 * hidden * width + hidden * heads),
            Matrix("self_attn.gates", low_rank),
        )
        state = heads * size * size * STATE_BYTES + 3 * width * (kernel - 1) * item
        return Mixer(matrices=matrices, state=state)
    key_size = fields.count("linear_key_head_dim")
    value_size = fields.count("linear_value_head_dim")
    value_heads = fields.count("linear_num_value_heads")
    keys = fields.count("linear_num_key_heads") * key_size
    values = value_heads * value_size
    kernel = fields.count("linear_conv_kernel_dim", 4)
    return Mixer(
        matrices=(
            Matrix("linear_attn.in_proj_qkvz", hidden * 2 * (keys + values)),
            Matrix("linear_attn.in_proj_ba", hidden * 2 * value_heads),
            Matrix("linear_attn.out_proj", hidden * values),
        ),
        state=value_heads * key_size * value_size * STATE_BYTES
        + (2 * keys + values) * (kernel - 1) * item,
    )


def mamba(fields: Fields) -> Mixer:
    """A selective state space: Mamba 2 where heads are configured, Mamba otherwise."""
    hidden, item = fields.count("hidden_size"), fields.element_bytes
    size, kernel = fields.count("mamba_state_size"), fields.count("mamba_conv_kernel", 4)
    heads = fields.maybe("mamba_num_heads")
    if heads is None and fields.family == "mamba2":
        heads = fields.count("num_attention_heads")
    if heads:
        head = fields.maybe("mamba_head_dim") or fields.maybe("head_dim")
        inner = heads * (head or hidden * fields.count("mamba_expand", 2) // heads)
        mixed = inner + 2 * fields.count("mamba_n_groups", 1) * size
        weights = hidden * (inner + mixed + heads)
    else:
        own = fields.maybe("intermediate_size") if fields.family.endswith("mamba") else None
        inner = mixed = own or hidden * fields.count("mamba_expand", 2)
        rank = fields.raw("mamba_dt_rank")
        steps = -(-hidden // 16) if rank in (None, "auto") else fields.count("mamba_dt_rank")
        weights = hidden * 2 * inner + inner * (2 * steps + 3 * size)
    return Mixer(
        matrices=(
            Matrix("mamba.in_proj", weights),
            Matrix("mamba.out_proj", hidden * inner),
        ),
        state=inner * size * STATE_BYTES + mixed * (kernel - 1) * item,
    )


def short_convolution(fields: Fields) -> Mixer:
    """LFM2's gated convolution over a few positions."""
    hidden = fields.count("hidden_size")
    width, kernel = fields.count("conv_dim", hidden), fields.count("conv_L_cache", 3)
    return Mixer(
        matrices=(
            Matrix("conv.in_proj", 3 * hidden * width),
            Matrix("conv.out_proj", hidden * width),
        ),
        state=width * (kernel - 1) * fields.element_bytes,
    )


def gated_recurrence(fields: Fields) -> Mixer:
    """RecurrentGemma's RG-LRU, whose gates are matrices per head."""
    hidden = fields.count("hidden_size")
    width = fields.count("lru_width", hidden)
    gates = 2 * width * width // fields.count("num_attention_heads")
    kernel = fields.count("conv1d_width", 4)
    return Mixer(
        matrices=(Matrix("temporal_block.linear", 3 * hidden * width + gates),),
        state=width * STATE_BYTES + width * (kernel - 1) * fields.element_bytes,
    )


def rwkv(fields: Fields) -> Mixer:
    """RWKV-7: four projections, low-rank ones for decay, gates and values, one state per head."""
    hidden, head = fields.count("hidden_size"), fields.count("head_dim", 64)
    names = ("decay_low_rank_dim", "a_low_rank_dim", "v_low_rank_dim", "gate_low_rank_dim")
    low_rank = sum(fields.count(name, head) for name in names)
    return Mixer(
        matrices=(Matrix("attn.rkvo_proj", 4 * hidden**2 + 2 * hidden * low_rank),),
        state=hidden * head * STATE_BYTES + 2 * hidden * fields.element_bytes,
    )


def hybrid(fields: Fields) -> Mixer:
    """Attention and a state space side by side in one layer."""
    one, other = attention(fields), mamba(fields)
    return Mixer(
        matrices=one.matrices + other.matrices, kv=one.kv, state=other.state, flops=one.flops
    )


def nothing(_: Fields) -> Mixer:
    return Mixer()


MIXERS: dict[str, Callable[[Fields], Mixer]] = {
    "full": full_attention,
    "window": attention,
    "linear": linear_attention,
    "mamba": mamba,
    "conv": short_convolution,
    "recurrent": gated_recurrence,
    "rwkv": rwkv,
    "hybrid": hybrid,
    "none": nothing,
}
