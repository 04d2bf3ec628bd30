"""Configurations come from anywhere: what cannot be right gets one clear line, at once."""

from typing import Any

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.cost.config import cost_from_config
from pxd.planning.model import ModelCost
from tests.planning.test_cost import LLAMA, MODELS


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("hidden_size", 0),
        ("hidden_size", -4096),
        ("hidden_size", "4096"),
        ("hidden_size", True),
        ("hidden_size", 4096.5),
        ("hidden_size", float("nan")),
        ("hidden_size", float("inf")),
        pytest.param("hidden_size", 10**5000, id="a number too long to print"),
        ("hidden_size", [4096]),
        ("hidden_size", None),
        ("num_hidden_layers", 0),
        ("num_hidden_layers", 2001),
        ("num_attention_heads", 0),
        ("num_attention_heads", 5000),
        ("num_key_value_heads", {"a": 1}),
        ("vocab_size", 1 << 40),
        ("max_position_embeddings", -1),
        ("tie_word_embeddings", "yes"),
        ("layer_types", ["full_attention", "quantum_attention"]),
        ("layer_types", "full_attention"),
        ("layer_types", ["full_attention"] * 100_000),
        ("sliding_window", "big"),
        ("hybrid_override_pattern", "M*"),
        ("mlp_only_layers", 3),
        ("quantization_config", "int4"),
        ("kv_lora_rank", 512),  # without the dimensions that belong to it
    ],
)
def test_one_clear_line(name: str, value: Any) -> None:
    experts = {"num_experts": 8, "num_experts_per_tok": 2}
    named = "qk_rope_head_dim" if name == "kv_lora_rank" else name
    with pytest.raises(ValueError, match=named) as caught:
        cost_from_config({**LLAMA, **experts, name: value})
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 200


def test_the_field_is_named_as_the_file_has_it() -> None:
    with pytest.raises(ValueError, match="n_layer = -1"):
        cost_from_config({**MODELS["gpt2"]["config"], "n_layer": -1})


def test_more_active_experts_than_there_are() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        cost_from_config({**LLAMA, "num_experts": 4, "num_experts_per_tok": 5})


def test_sizes_that_are_too_large_together() -> None:
    large = {"hidden_size": 1 << 22, "intermediate_size": 1 << 24, "num_hidden_layers": 2000}
    with pytest.raises(ValueError, match="more than 2\\^60"):
        cost_from_config({**LLAMA, **large, "num_experts": 1 << 20, "num_experts_per_tok": 2})


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = sorted({key for entry in MODELS.values() for key in entry["config"]} - {"text_config"})


@settings(deadline=None, max_examples=300)
@given(
    name=st.sampled_from(sorted(MODELS)),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, min_size=1, max_size=3),
)
def test_any_value_anywhere_gives_a_sane_cost_or_a_clear_line(
    name: str, changes: dict[str, Any]
) -> None:
    cost, complaint = None, ""
    try:
        cost = cost_from_config({**MODELS[name]["config"], **changes})
    except ValueError as error:
        complaint = str(error)
    if cost is None:
        assert complaint.startswith(("config.json", "the configuration"))
        assert "\n" not in complaint
        assert len(complaint) < 200
        return
    assert all(size > 0 for size in cost.layer_bytes)
    assert all(flops > 0 for flops in cost.layer_flops)
    assert all(size >= 0 for size in (*cost.kv_bytes_per_token, *cost.state_bytes))
    assert cost.embedding_bytes > 0
    assert msgspec.convert(msgspec.to_builtins(cost), ModelCost) == cost
