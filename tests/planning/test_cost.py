"""What models cost: published sizes, and each kind of layer (data/model_configs.json)."""

import json
from pathlib import Path
from typing import Any

import pytest

from pxd.planning.cost.config import cost_from_config
from pxd.planning.model import ModelCost

MODELS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "model_configs.json").read_text()
)
MODELS.pop("about")
LLAMA: dict[str, Any] = MODELS["llama-3.1-8b"]["config"]
GIB = 1 << 30


def config(name: str, **changes: Any) -> dict[str, Any]:
    return {**MODELS[name]["config"], **changes}


def cost(name: str, **changes: Any) -> ModelCost:
    return cost_from_config(config(name, **changes))


def total_bytes(model: ModelCost) -> int:
    return sum(model.layer_bytes) + model.ends_bytes


@pytest.mark.parametrize("name", MODELS)
def test_published_parameter_counts(name: str) -> None:
    model = cost(name, quantization_config=None, dtype="bfloat16")
    assert total_bytes(model) / 2e9 == pytest.approx(MODELS[name]["total"], rel=0.015)


@pytest.mark.parametrize("name", [name for name in MODELS if "active" in MODELS[name]])
def test_published_active_parameters(name: str) -> None:
    model = cost(name, quantization_config=None, dtype="bfloat16")
    with_head = (sum(model.layer_flops) + model.head_flops) / 2
    counted = [with_head, with_head + model.embedding_bytes / 2, sum(model.layer_flops) / 2]
    published = MODELS[name]["active"] * 1e9
    assert min(abs(count / published - 1) for count in counted) < 0.03


@pytest.mark.parametrize(
    ("name", "quantisation", "published"),
    [
        ("gpt-oss-20b", {}, 12.8 * GIB),
        ("gpt-oss-120b", {}, 60.8 * GIB),
        # mlx-community/Qwen3-8B-4bit
        ("qwen3-8b", {"quantization": {"bits": 4, "group_size": 64}}, 4.61e9),
        # hugging-quants/Meta-Llama-3.1-8B-Instruct-AWQ-INT4
        (
            "llama-3.1-8b",
            {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128}},
            5.73e9,
        ),
        # unsloth/Meta-Llama-3.1-8B-bnb-4bit
        (
            "llama-3.1-8b",
            {
                "quantization_config": {
                    "quant_method": "bitsandbytes",
                    "load_in_4bit": True,
                    "bnb_4bit_use_double_quant": True,
                }
            },
            5.70e9,
        ),
        # neuralmagic/Meta-Llama-3.1-8B-Instruct-FP8
        ("llama-3.1-8b", {"quantization_config": {"quant_method": "fbgemm_fp8"}}, 9.08e9),
    ],
)
def test_published_sizes_of_quantised_checkpoints(
    name: str, quantisation: dict[str, Any], published: float
) -> None:
    assert total_bytes(cost(name, **quantisation)) == pytest.approx(published, rel=0.01)


def test_grouped_attention_keeps_keys_and_values_of_few_heads() -> None:
    model = cost("llama-3.1-8b")
    assert set(model.kv_bytes_per_token) == {2 * 8 * 128 * 2}
    assert set(model.attention_flops) == {2 * 32 * (128 + 128)}
    assert (model.hidden_size, model.activation_bytes, model.context) == (4096, 2, 131072)
    assert model.splits == tuple(range(1, 32))
    assert not any(model.windows)
    assert not any(model.experts)


def test_latent_attention_keeps_one_latent_per_position() -> None:
    model = cost("deepseek-v3")
    assert set(model.kv_bytes_per_token) == {(512 + 64) * 2}


def test_leading_dense_layers_and_shared_experts() -> None:
    model = cost("deepseek-v3")
    assert [bool(one) for one in model.experts] == [False] * 3 + [True] * 58
    one = model.experts[-1]
    assert one is not None
    assert (one.total, one.active, one.bytes_each) == (256, 8, 3 * 7168 * 2048 * 2)
    alone = cost("deepseek-v3", n_shared_experts=0)
    assert model.layer_bytes[-1] - alone.layer_bytes[-1] == one.bytes_each
    assert model.layer_flops[-1] - alone.layer_flops[-1] == one.bytes_each


def test_which_layers_are_windowed() -> None:
    def windows(name: str, **changes: Any) -> tuple[int, ...]:
        return cost(name, **changes).windows

    assert windows("mistral-7b-v0.1") == (4096,) * 32
    assert windows("gpt-oss-20b")[:4] == (128, 0, 128, 0)
    assert windows("gpt-oss-120b")[:4] == (128, 0, 128, 0)  # without layer_types
    assert windows("gemma-2-9b")[:4] == (4096, 0, 4096, 0)
    assert windows("gemma-3-27b")[:7] == (1024,) * 5 + (0, 1024)
    assert windows("llama-4-scout")[:5] == (8192, 8192, 8192, 0, 8192)
    pattern = {"sliding_window": 512, "sliding_window_pattern": "LLG"}
    assert windows("llama-3.1-8b", **pattern)[:4] == (512, 512, 0, 512)


def test_a_window_may_be_switched_off_or_start_late() -> None:
    named: dict[str, Any] = {"sliding_window": 4096, "max_window_layers": 30}
    assert not any(cost("qwen3-8b", **named, use_sliding_window=False).windows)
    assert not any(cost("qwen3-8b", **named, use_sliding_window=None).windows)
    on = cost("qwen3-8b", **named, use_sliding_window=True).windows
    assert on == (0,) * 30 + (4096,) * 6
    # one as long as any sequence is none
    assert not any(cost("mistral-7b-v0.1", sliding_window=32768).windows)


def test_linear_attention_keeps_a_state_in_place_of_a_cache() -> None:
    model = cost("qwen3-next-80b-a3b")
    assert model.kv_bytes_per_token[:4] == (0, 0, 0, 2 * 2 * 256 * 2)
    matrices, convolution = 32 * 128 * 128 * 4, (2 * 16 * 128 + 32 * 128) * 3 * 2
    assert model.state_bytes[:4] == (matrices + convolution,) * 3 + (0,)
    assert model.attention_flops[:3] == (0, 0, 0)
    assert model.attention_flops[3] > 0


def test_state_spaces_with_attention_here_and_there() -> None:
    jamba = cost("jamba-v0.1")
    assert [i for i, kv in enumerate(jamba.kv_bytes_per_token) if kv] == [4, 12, 20, 28]
    assert [i for i, one in enumerate(jamba.experts) if one] == list(range(1, 32, 2))
    assert jamba.state_bytes[0] == 8192 * 16 * 4 + 8192 * 3 * 2
    granite = cost("granite-4.0-h-tiny")
    assert [i for i, kv in enumerate(granite.kv_bytes_per_token) if kv] == [5, 15, 25, 35]
    lfm2 = cost("lfm2-1.2b")
    assert [i for i, kv in enumerate(lfm2.kv_bytes_per_token) if kv] == [2, 5, 8, 10, 12, 14]
    assert not any(cost("mamba-2.8b").kv_bytes_per_token)
    kimi = cost("kimi-linear-48b-a3b")
    assert [i for i, kv in enumerate(kimi.kv_bytes_per_token) if kv] == [3, 7, 11, 15, 19, 23, 26]


def test_nemotron_layers_are_one_thing_each() -> None:
    pattern = config("nemotron-nano-9b-v2")["hybrid_override_pattern"]
    model = cost("nemotron-nano-9b-v2")
    assert [bool(kv) for kv in model.kv_bytes_per_token] == [c == "*" for c in pattern]
    assert [bool(state) for state in model.state_bytes] == [c == "M" for c in pattern]
    names = {"M": "mamba", "*": "attention", "-": "mlp"}
    spelt = {"hybrid_override_pattern": None, "layers_block_type": [names[c] for c in pattern]}
    assert cost("nemotron-nano-9b-v2", **spelt) == model


def test_layers_may_list_sizes_of_their_own() -> None:
    model = cost("llama-3.1-8b", intermediate_size=[1024] * 31 + [4096])
    assert model.layer_bytes[0] == model.layer_bytes[30]
    assert model.layer_bytes[31] - model.layer_bytes[0] == 3 * 4096 * 3072 * 2
    with pytest.raises(ValueError, match="intermediate_size for 2 layers"):
        cost("llama-3.1-8b", intermediate_size=[1024] * 2)


def test_ends_are_tied_where_the_family_says_so() -> None:
    assert cost("qwen3-0.6b").tied
    assert cost("gemma-3-27b").tied  # its configuration does not say
    assert not cost("llama-3.1-8b").tied
    tied = cost("llama-3.1-8b", tie_word_embeddings=True)
    assert tied.embedding_bytes == tied.head_bytes == tied.ends_bytes == 128256 * 4096 * 2


def test_gemma_4_shares_caches_and_feeds_layers_their_own_embedding() -> None:
    small = {
        "model_type": "gemma4_text", "hidden_size": 64, "intermediate_size": 96,
        "num_hidden_layers": 4, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16,
        "global_head_dim": 32, "num_kv_shared_layers": 2, "vocab_size": 100,
        "sliding_window": 8, "sliding_window_pattern": 2, "max_position_embeddings": 1024,
    }  # fmt: skip
    model = cost_from_config(small)
    assert model.kv_bytes_per_token == (2 * 2 * 16 * 2, 2 * 2 * 32 * 2, 0, 0)
    with_inputs = cost_from_config({**small, "hidden_size_per_layer_input": 8})
    assert with_inputs.embedding_bytes - model.embedding_bytes == 4 * 8 * (100 + 64) * 2
    assert with_inputs.layer_bytes[0] - model.layer_bytes[0] == 2 * 64 * 8 * 2


def test_float32_doubles_everything() -> None:
    model, double = cost("qwen3-0.6b"), cost("qwen3-0.6b", torch_dtype="float32")
    assert total_bytes(double) == 2 * total_bytes(model)
    assert double.kv_bytes_per_token[0] == 2 * model.kv_bytes_per_token[0]
    assert (model.compute_scale, double.compute_scale) == (1.0, 0.5)


def test_context_by_any_name() -> None:
    assert cost("gpt2").context == 1024
    assert cost("kimi-linear-48b-a3b").context == 1 << 20
    assert cost("falcon-7b").context == 0


TENSORS = {
    "model.embed_tokens.weight": 1000,
    "model.layers.0.self_attn.q_proj.weight": 10,
    "model.layers.0.mlp.experts.0.up_proj.weight": 8,
    "model.layers.0.mlp.experts.1.up_proj.weight": 8,
    "model.layers.0.mlp.shared_experts.up_proj.weight": 5,
    "model.layers.1.mlp.switch_mlp.up_proj.weight": 40,
    "model.layers.2.eh_proj.weight": 7777,  # a layer for drafting
    "model.norm.weight": 3,
    "lm_head.weight": 2000,
    "visual.blocks.0.attn.qkv.weight": 5555,
    "visual.blocks.1.attn.qkv.weight": 5555,
}


def test_tensors_beat_every_formula() -> None:
    small = config("mixtral-8x7b", num_hidden_layers=2, num_local_experts=2)
    formula, model = cost_from_config(small), cost_from_config(small, TENSORS)
    assert model.layer_bytes == (10 + 8 + 8 + 5, 40)
    assert [one and one.bytes_each for one in model.experts] == [8, 20]
    assert (model.embedding_bytes, model.head_bytes, model.tied) == (1000, 2003, False)
    assert model.layer_flops == formula.layer_flops
    assert model.kv_bytes_per_token == formula.kv_bytes_per_token


def test_tensors_tell_whether_the_ends_are_tied() -> None:
    small = config("mixtral-8x7b", num_hidden_layers=2, num_local_experts=2)
    tied = {name: size for name, size in TENSORS.items() if name != "lm_head.weight"}
    model = cost_from_config(small, tied)
    assert (model.embedding_bytes, model.head_bytes, model.tied) == (1000, 1003, True)


def test_layers_without_numbers_get_equal_parts() -> None:
    small = config("llama-3.1-8b", num_hidden_layers=3)
    model = cost_from_config(small, {"model.embed_tokens.weight": 10, "model.all": 301})
    assert model.layer_bytes == (101, 101, 101)
