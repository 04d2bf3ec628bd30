"""What configurations of these families leave to their code. Keys as in config.json.

Beside real fields: `mlp_matrices` (3: gated, 2: not), `mixer` (the kind of every layer), `ffn`
(False: layers have none), `intermediate_parts` (the width is this part of intermediate_size).
After the configuration classes of Hugging Face transformers and mlx-lm.
"""

from typing import Any

Family = dict[str, Any]

_TIED: Family = {"tie_word_embeddings": True}
_PLAIN: Family = {"mlp_matrices": 2}
_GEMMA3: Family = {
    **_TIED,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "head_dim": 256,
    "vocab_size": 262208,
    "sliding_window": 4096,
    "sliding_window_pattern": 6,
    "max_position_embeddings": 131072,
}
_GEMMA4: Family = {**_TIED, "sliding_window_pattern": 5, "global_head_dim": 512}
_DELTA: Family = {"full_attention_interval": 4, "attn_output_gate": True, "head_dim": 256}

FAMILIES: dict[str, Family] = {
    "afmoe": {"attn_output_gate": True},
    "apertus": _PLAIN,
    "arcee": _PLAIN,
    "bamba": {"mamba_expand": 2},
    "bloom": {**_TIED, **_PLAIN},
    "codegen": _PLAIN,
    "cohere": _TIED,
    "cohere2": {**_TIED, "sliding_window": 4096, "sliding_window_pattern": 4},
    "ernie4_5": _TIED,
    "ernie4_5_moe": _TIED,
    "falcon": {**_TIED, **_PLAIN, "multi_query": True},
    "falcon_h1": {"mixer": "hybrid"},
    "falcon_mamba": {**_TIED, "mixer": "mamba", "ffn": False},
    "gemma": {**_TIED, "head_dim": 256},
    "gemma2": {**_TIED, "head_dim": 256, "sliding_window": 4096, "sliding_window_pattern": 2},
    "gemma3": _GEMMA3,
    "gemma3_text": _GEMMA3,
    "gemma3n": {**_TIED, "sliding_window_pattern": 5},
    "gemma3n_text": {**_TIED, "sliding_window_pattern": 5},
    "gemma4": _GEMMA4,
    "gemma4_text": _GEMMA4,
    "gpt2": {**_TIED, **_PLAIN},
    "gpt_bigcode": {**_TIED, **_PLAIN, "multi_query": True},
    "gpt_neo": {**_TIED, **_PLAIN},
    "gpt_neox": _PLAIN,
    "gpt_oss": {"sliding_window": 128, "sliding_window_pattern": 2, "head_dim": 64},
    "gptj": _PLAIN,
    "jamba": {
        "attn_layer_period": 8,
        "attn_layer_offset": 4,
        "expert_layer_period": 2,
        "expert_layer_offset": 1,
    },
    "lfm2": _TIED,
    "lfm2_moe": _TIED,
    "llama4_text": {
        "sliding_window": 8192,
        "sliding_window_pattern": 4,
        "n_shared_experts": 1,
        "decoder_sparse_step": 1,
    },
    "mamba": {**_TIED, "mixer": "mamba", "ffn": False},
    "mamba2": {"mixer": "mamba", "ffn": False, "mamba_expand": 2, "mamba_n_groups": 8},
    "minicpm3": _TIED,
    "mpt": {**_TIED, **_PLAIN},
    "nanochat": _PLAIN,
    "nemotron": _PLAIN,
    "nemotron_h": _PLAIN,
    "olmo3": {"sliding_window_pattern": 4},
    "opt": {**_TIED, **_PLAIN},
    "phi": _PLAIN,
    "phixtral": _PLAIN,
    "qwen3_5": _DELTA,
    "qwen3_5_moe": _DELTA,
    "qwen3_5_text": _DELTA,
    "qwen3_5_moe_text": _DELTA,
    "qwen3_next": _DELTA,
    "recurrent_gemma": {
        **_TIED,
        "layer_types": ["recurrent", "recurrent", "attention"],
        "sliding_window": 2048,
        "intermediate_parts": 2,
    },
    "rwkv7": {**_PLAIN, "mixer": "rwkv"},
    "smollm3": _TIED,
    "starcoder2": {**_TIED, **_PLAIN},
}
