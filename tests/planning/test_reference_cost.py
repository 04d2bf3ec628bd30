"""The reference's cost model against its public vectors (data/reference_cost.json)."""

import json
import math
import re
from pathlib import Path
from typing import Any

import pytest

from pxd.planning.capacity import layer_capacity
from pxd.planning.cost.reference import (
    CostFields,
    ReferenceStage,
    attention_bytes,
    embedding_bytes,
    expected_experts,
    ffn_bytes,
    head_flops,
    kv_bytes_per_token,
    layer_bytes,
    layer_flops,
    layer_io_bytes,
    layer_latency_ms,
    read_cost_fields,
    to_model_cost,
)

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "reference_cost.json").read_text()
)
FIELDS: dict[str, Any] = VECTORS["model"]["fields"]
DERIVED: dict[str, Any] = VECTORS["model"]["derived_for_any_L"]
DENSE: dict[str, Any] = {**FIELDS, "num_local_experts": None, "num_experts_per_tok": None}


def model(**changes: Any) -> CostFields:
    return read_cost_fields({**FIELDS, **changes})


def shape(label: str) -> tuple[int, int, int]:
    """(batch, target, source) of a label such as b1_t1_s4096."""
    batch, target, source = re.findall(r"\d+", label)
    return int(batch), int(target), int(source)


def test_sizes_of_the_vectors() -> None:
    fields = model()
    assert (fields.q_dim, fields.k_dim, fields.v_dim) == (4096, 512, 512)
    assert fields.mlx_bit_factor == DERIVED["mlx_bit_factor"]
    assert embedding_bytes(fields) == DERIVED["embedding_io_bytes"]
    assert kv_bytes_per_token(fields) == DERIVED["per_token_per_layer_kv_size"]
    assert attention_bytes(fields) == DERIVED["attention_param_bytes"]
    assert ffn_bytes(fields) == DERIVED["ffn_param_bytes_one_expert"]
    assert layer_bytes(fields) == DERIVED["decoder_layer_io_bytes(roofline=False)"]
    assert head_flops(fields) == DERIVED["lm_head_flops(1)"]


@pytest.mark.parametrize(
    ("label", "size"), DERIVED["decoder_layer_io_bytes(roofline=True)"].items()
)
def test_bytes_read_for_a_step(label: str, size: int) -> None:
    assert layer_io_bytes(model(), *shape(label)) == size


@pytest.mark.parametrize(("label", "flops"), DERIVED["decoder_layer_flops"].items())
def test_flops_of_a_step(label: str, flops: int) -> None:
    assert layer_flops(model(), *shape(label)) == flops


@pytest.mark.parametrize(("label", "experts"), DERIVED["expected_num_activated_experts"].items())
def test_expected_experts(label: str, experts: int) -> None:
    assert expected_experts(model(), int(label[1:])) == experts


@pytest.mark.parametrize("gpu", VECTORS["capacities"])
def test_capacities(gpu: str) -> None:
    cost = to_model_cost(model())
    room = math.floor(VECTORS["gpus"][gpu]["memory_gb"] * 2**30 * 0.5)
    found = {
        "plain": layer_capacity(room, cost, embedding=False, head=False),
        "embed": layer_capacity(room, cost, embedding=True, head=False),
        "lm_head": layer_capacity(room, cost, embedding=False, head=True),
        "embed+lm_head(untied)": layer_capacity(room, cost, embedding=True, head=True),
    }
    assert found == VECTORS["capacities"][gpu]


def test_capacities_follow_the_ratio() -> None:
    rooms = [math.floor(gpu["memory_gb"] * 2**30 * 0.65) for gpu in VECTORS["gpus"].values()]
    cost = to_model_cost(model())
    plain = [layer_capacity(room, cost, embedding=False, head=False) for room in rooms]
    assert plain == [17, 8, 6, 5]


@pytest.mark.parametrize("node", VECTORS["latencies"])
def test_roofline_latency(node: dict[str, Any]) -> None:
    """The vectors' figures were made without any request running, so that no expert is read."""
    start, end = node["range"]
    stage = ReferenceStage(
        layers=end - start,
        embedding=start == 0,
        head=end == node["layers"],
        tflops=node["tflops"],
        bandwidth=node["bandwidth_gbps"],
    )
    assert layer_latency_ms(model(), stage) == pytest.approx(node["layer_latency_ms"], rel=1e-9)


def test_compute_bounds_a_slow_chip() -> None:
    stage = ReferenceStage(
        layers=2, embedding=False, head=False, tflops=1, bandwidth=1e6, requests=8
    )
    flops = DERIVED["decoder_layer_flops"]["b8_t1_s4096"]
    # 8-bit weights multiply 1.6 times as fast as 16-bit ones
    assert layer_latency_ms(model(), stage) == pytest.approx(flops / 1.6e9)


def test_a_measured_latency_beats_the_roofline() -> None:
    def stage(requests: int) -> ReferenceStage:
        return ReferenceStage(
            layers=2,
            embedding=True,
            head=True,
            tflops=1,
            bandwidth=1,
            requests=requests,
            measured_ms=3.0,
        )

    assert layer_latency_ms(model(), stage(0)) == 3.0
    assert layer_latency_ms(model(), stage(8)) == pytest.approx(3.025)
    assert layer_latency_ms(model(), stage(16)) == math.inf  # overloaded


def test_speed_counts_active_experts_only() -> None:
    mixture, dense = to_model_cost(model()), to_model_cost(read_cost_fields(DENSE))
    expert = 2 * 3 * 2880 * 2880
    assert mixture.layer_flops[0] - dense.layer_flops[0] == (4 - 1) * expert
    one = mixture.experts[0]
    assert one is not None
    assert (one.total, one.active, one.bytes_each) == (128, 4, 3 * 2880 * 2880)
    assert dense.experts[0] is None


def test_heads_share_the_hidden_size_where_theirs_is_not_given() -> None:
    assert model(head_size=None).value_size == 2880 // 64
    assert model(qk_nope_head_dim=128, qk_rope_head_dim=64).k_dim == 8 * 192


def test_mlx_weights_may_take_other_sizes() -> None:
    fields = model(mlx_param_bytes_per_element=0.5)
    assert to_model_cost(fields, mlx=True).layer_bytes[0] == layer_bytes(fields) // 2
    assert to_model_cost(fields).layer_bytes[0] == layer_bytes(fields)
    assert to_model_cost(fields, mlx=True).compute_scale == 3.2


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("num_layers", 0),
        ("num_layers", 2001),
        ("num_layers", "12"),
        ("hidden_dim", -1),
        ("hidden_dim", 1 << 40),
        ("num_kv_heads", 0),
        ("vocab_size", 1.5),
        ("param_bytes_per_element", 0),
        ("param_bytes_per_element", math.nan),
        ("cache_bytes_per_element", math.inf),
        ("num_experts_per_tok", 129),
        ("tie_embedding", "no"),
    ],
)
def test_what_cannot_be_right_is_refused_by_name(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=name) as caught:
        model(**{name: value})
    assert "\n" not in str(caught.value)


def test_a_model_larger_than_any_is_refused() -> None:
    with pytest.raises(ValueError, match="more than 2\\^60"):
        to_model_cost(
            model(hidden_dim=1 << 24, intermediate_dim=1 << 24, num_local_experts=1 << 20)
        )


def test_a_missing_field_is_named() -> None:
    with pytest.raises(ValueError, match="hidden_dim"):
        read_cost_fields({name: value for name, value in FIELDS.items() if name != "hidden_dim"})
    with pytest.raises(ValueError, match="object"):
        read_cost_fields([1])
