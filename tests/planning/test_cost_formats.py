"""Quantised models, from their configurations alone."""

from typing import Any

import pytest

from pxd.planning.cost.config import cost_from_config
from pxd.planning.model import ModelCost

DENSE: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "vocab_size": 1000,
    "tie_word_embeddings": False,
}  # fmt: skip
MIXTURE: dict[str, Any] = {
    **DENSE, "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2,
    "moe_intermediate_size": 128,
}  # fmt: skip
ATTENTION = 256 * 64 * (4 + 2 + 2 + 4)
MLP = 3 * 256 * 512
EXPERT = 3 * 256 * 128
ENDS = 1000 * 256


def model(base: dict[str, Any], **changes: Any) -> ModelCost:
    return cost_from_config({**base, **changes})


def hub(method: str, **options: Any) -> dict[str, Any]:
    return {"quantization_config": {"quant_method": method, **options}}


def test_mlx_quantises_the_ends_too_and_keeps_a_scale_and_a_bias_per_group() -> None:
    quantised = model(DENSE, quantization={"bits": 4, "group_size": 64})
    assert quantised.layer_bytes[0] == (ATTENTION + MLP) * (4 / 8 + 4 / 64)
    assert quantised.embedding_bytes == quantised.head_bytes == ENDS * (4 / 8 + 4 / 64)
    assert quantised.expansion == pytest.approx(2 / (4 / 8 + 4 / 64))
    assert model(DENSE).expansion == model(MIXTURE).expansion == 1
    mixture = model(MIXTURE, quantization={"bits": 8, "group_size": 64})
    assert mixture.expansion == pytest.approx(2 / (1 + 4 / 64))
    blocks = model(DENSE, quantization={"bits": 4, "group_size": 32, "mode": "mxfp4"})
    assert blocks.layer_bytes[0] == (ATTENTION + MLP) * (4 / 8 + 1 / 32)


def test_mlx_may_treat_single_matrices_differently() -> None:
    mixed = model(
        DENSE,
        quantization={
            "bits": 4,
            "group_size": 64,
            "model.layers.1.mlp.down_proj": {"bits": 8, "group_size": 64},
            "model.layers.1.self_attn.v_proj": False,
            "lm_head": {"bits": 6, "group_size": 64},
            "model.embed_tokens": True,
        },
    )
    down, values = 256 * 512, 256 * 64 * 2
    more = down * (8 - 4) / 8 + values * (2 - 4 / 8 - 4 / 64)
    assert mixed.layer_bytes[1] - mixed.layer_bytes[0] == more
    assert mixed.head_bytes == ENDS * (6 / 8 + 4 / 64)
    assert mixed.embedding_bytes == ENDS * (4 / 8 + 4 / 64)


def test_a_whole_tower_or_name_may_be_left_out() -> None:
    left_out = ["model.layers.0", "mlp.gate", "visual.blocks.0.attn.qkv", "lm_head"]
    fp8 = model(MIXTURE, **hub("fp8", modules_to_not_convert=left_out))
    router = 256 * 4
    assert fp8.layer_bytes[0] == 2 * (ATTENTION + router + 4 * EXPERT)
    assert fp8.layer_bytes[1] == ATTENTION + 4 * EXPERT + 2 * router


def test_mxfp4_is_for_experts_only() -> None:
    quantised, plain = model(MIXTURE, **hub("mxfp4")), model(MIXTURE)
    assert quantised.layer_bytes[0] == plain.layer_bytes[0] - 4 * EXPERT * (2 - 4 / 8 - 1 / 32)
    one = quantised.experts[0]
    assert one is not None
    assert one.bytes_each == EXPERT * (4 / 8 + 1 / 32)


@pytest.mark.parametrize(
    ("quantisation", "per_weight"),
    [
        (hub("gptq", bits=4, group_size=128), 4 / 8 + 2.5 / 128),
        (hub("awq", bits=4, group_size=64), 4 / 8 + 2.5 / 64),
        (hub("gptq", bits=8, group_size=-1), 1),
        (hub("bitsandbytes", load_in_8bit=True), 1),
        (hub("bitsandbytes", load_in_4bit=True), 4 / 8 + 4 / 64),
        (hub("fp8", weight_block_size=[128, 128]), 1 + 4 / 128**2),
        (hub("modelopt", quant_algo="NVFP4"), 4 / 8 + 1 / 16),
        (hub("hqq", bits=4, group_size=64), 4 / 8 + 4 / 64),
        (hub("fp8", weight_block_size=[1 << 19] * 1000), 1),
        (hub("quite-new"), 2),  # better too much memory than too little
    ],
)
def test_methods_of_the_hub_leave_the_ends_alone(
    quantisation: dict[str, Any], per_weight: float
) -> None:
    quantised = model(DENSE, **quantisation)
    assert quantised.layer_bytes[0] == pytest.approx((ATTENTION + MLP) * per_weight, rel=1e-4)
    assert quantised.embedding_bytes == quantised.head_bytes == ENDS * 2


def test_compressed_tensors_come_in_groups() -> None:
    groups = {
        "group_0": {"targets": ["Linear"], "weights": {"num_bits": 8, "type": "float"}},
        "group_1": {
            "targets": ["re:.*mlp\\.experts.*"],
            "weights": {"num_bits": 4, "group_size": 32, "type": "int"},
        },
    }
    ignored = ["lm_head", "re:.*mlp\\.gate$"]
    quantised = model(MIXTURE, **hub("compressed-tensors", config_groups=groups, ignore=ignored))
    experts, router = 4 * EXPERT * (4 / 8 + 2 / 32), 256 * 4 * 2
    assert quantised.layer_bytes[0] == ATTENTION + experts + router


@pytest.mark.parametrize(
    ("quantisation", "speed"),
    [({}, 1.0), (hub("fp8"), 1.6), ({"quantization": {"bits": 4, "group_size": 64}}, 3.2)],
)
def test_speed_of_the_number_format(quantisation: dict[str, Any], speed: float) -> None:
    assert model(DENSE, **quantisation).compute_scale == pytest.approx(speed)


@pytest.mark.parametrize(
    ("quantisation", "complaint"),
    [
        ({"quantization": {"bits": 0}}, "bits"),
        ({"quantization": {"bits": "4"}}, "bits"),
        ({"quantization": {"bits": 4, "group_size": -7}}, "group_size"),
        ({"quantization": 4}, "quantization = 4"),
        (hub("compressed-tensors", config_groups=[1]), "config_groups"),
        (hub("fp8", ignore=[7]), "rule"),
        (hub("fp8", ignore=[f"layer{i}" for i in range(2000)]), "too many"),
    ],
)
def test_what_cannot_be_right_is_refused(quantisation: dict[str, Any], complaint: str) -> None:
    with pytest.raises(ValueError, match=complaint):
        model(DENSE, **quantisation)
