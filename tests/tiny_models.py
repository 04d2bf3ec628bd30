"""Makes tiny models with random weights, in Hugging Face layout, from real configurations.

    python -m tests.tiny_models ARCHITECTURE DIRECTORY [--dtype float32] [--quantize] [--shards 2]

Weights are made by mlx-lm's own model classes. Runs in a process of its own: many architectures
built in one process, one after the other, have been seen to corrupt the heap.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

VOCABULARY = 288
END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

_COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
    "eos_token_id": 257,
}
_GEMMA3: dict[str, Any] = {
    **_COMMON,
    "model_type": "gemma3_text",
    "query_pre_attn_scalar": 16,
    "sliding_window": 8,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 10000.0,
    "rope_global_base_freq": 1000000.0,
    "rope_traditional": False,
    "tie_word_embeddings": True,
}
_MLA: dict[str, Any] = {
    **_COMMON,
    "num_key_value_heads": 4,
    "moe_intermediate_size": 32,
    "n_shared_experts": 1,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "routed_scaling_factor": 1.0,
    "kv_lora_rank": 32,
    "q_lora_rank": 32,
    "qk_rope_head_dim": 16,
    "qk_nope_head_dim": 16,
    "v_head_dim": 16,
    "first_k_dense_replace": 1,
    "moe_layer_freq": 1,
    "n_group": 1,
    "topk_group": 1,
    "attention_bias": False,
}

CONFIGS: dict[str, dict[str, Any]] = {
    "qwen3": {**_COMMON, "model_type": "qwen3", "tie_word_embeddings": True},
    "llama": {**_COMMON, "model_type": "llama"},
    # With one layer, attention over all of a long prompt is computed for its last token only.
    "long_llama": {
        **_COMMON,
        "model_type": "llama",
        "num_hidden_layers": 1,
        "max_position_embeddings": 131_072,
    },
    "qwen3_moe": {
        **_COMMON,
        "model_type": "qwen3_moe",
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "norm_topk_prob": True,
    },
    "gemma3_text": _GEMMA3,
    "gemma3": {
        "model_type": "gemma3",
        "vocab_size": VOCABULARY,
        "eos_token_id": 257,
        "text_config": {
            key: value for key, value in _GEMMA3.items() if key != "max_position_embeddings"
        },
    },
    "gpt_oss": {
        **_COMMON,
        "model_type": "gpt_oss",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "sliding_window": 8,
        "rope_scaling": None,
        "layer_types": ["sliding_attention", "full_attention"] * 3,
    },
    "mixtral": {
        **_COMMON,
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
    },
    "deepseek_v2": {
        **_MLA,
        "model_type": "deepseek_v2",
        "topk_method": "greedy",
        "rope_scaling": {
            "type": "yarn",
            "factor": 4,
            "original_max_position_embeddings": 256,
            "beta_fast": 32,
            "beta_slow": 1,
            "mscale": 0.707,
            "mscale_all_dim": 0.707,
        },
    },
    "deepseek_v3": {
        **_MLA,
        "model_type": "deepseek_v3",
        "topk_method": "noaux_tc",
        "scoring_func": "sigmoid",
        "norm_topk_prob": True,
    },
    "qwen3_next": {
        **_COMMON,
        "model_type": "qwen3_next",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "decoder_sparse_step": 1,
        "shared_expert_intermediate_size": 32,
        "mlp_only_layers": [],
        "moe_intermediate_size": 32,
        "partial_rotary_factor": 0.5,
        "full_attention_interval": 3,
    },
    # Its code asks for the type of each layer.
    "olmo_hybrid": {
        **_COMMON,
        "model_type": "olmo_hybrid",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 16,
        "linear_value_head_dim": 16,
        "linear_conv_kernel_dim": 4,
        "linear_allow_neg_eigval": True,
        "attention_bias": False,
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
    },
    # Its code cannot batch: masks meet the wrong dimension.
    "gemma2": {
        **_COMMON,
        "model_type": "gemma2",
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 50.0,
        "final_logit_softcapping": 30.0,
        "tie_word_embeddings": True,
    },
    # Values of the first layer are used by all others, so nothing can be cut.
    "rwkv7": {
        "model_type": "rwkv7",
        "vocab_size": VOCABULARY,
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 4,
        "norm_eps": 1e-5,
        "head_dim": 16,
        "a_low_rank_dim": 16,
        "v_low_rank_dim": 16,
        "gate_low_rank_dim": 16,
        "decay_low_rank_dim": 16,
        "eos_token_id": 257,
    },
}


def make_in_process(
    architecture: str,
    directory: Path,
    *,
    dtype: str = "float32",
    quantize: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a model in this process; see the module for why `make_tiny_model` is usually better."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    config = {**CONFIGS[architecture], "dtype": dtype}
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    # Larger than the usual start values: answers must depend on every layer.
    model.update(
        tree_map(
            lambda p: p + 0.3 * mx.random.normal(p.shape) if p.ndim > 1 else p, model.parameters()
        )
    )
    model.set_dtype(getattr(mx, dtype))
    if quantize:
        nn.quantize(model, group_size=32, bits=4)
        config["quantization"] = {"group_size": 32, "bits": 4}
    tied = bool(config.get("tie_word_embeddings") or config.get("text_config"))
    weights = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if not (tied and ".lm_head." in f".{name}")
    }
    directory.mkdir(parents=True, exist_ok=True)
    _save(weights, directory, shards)
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


def _save(weights: dict[str, Any], directory: Path, shards: int) -> None:
    import mlx.core as mx

    if shards == 1:
        mx.save_safetensors(
            str(directory / "model.safetensors"), weights, metadata={"format": "mlx"}
        )
        return
    names = sorted(weights)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard * size : (shard + 1) * size]}
        mx.save_safetensors(str(directory / file), part, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes with the special tokens of `CHAT_TEMPLATE`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|user|>", END, "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def make_tiny_model(
    architecture: str,
    directory: Path,
    *,
    dtype: str = "float32",
    quantize: bool = False,
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a model in a process of its own and return `directory`."""
    command = [sys.executable, "-m", "tests.tiny_models", architecture, str(directory)]
    command += ["--dtype", dtype, "--shards", str(shards), "--seed", str(seed)]
    if quantize:
        command.append("--quantize")
    root = Path(__file__).resolve().parent.parent
    subprocess.run(command, check=True, cwd=root, timeout=300)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=sorted(CONFIGS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", action="store_true")
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    make_in_process(arguments.pop("architecture"), arguments.pop("directory"), **arguments)


if __name__ == "__main__":
    main()
