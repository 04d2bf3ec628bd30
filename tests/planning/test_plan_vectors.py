"""Capacity and water-filling against the reference vectors (data/allocation_vectors.json)."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from pxd.planning.capacity import layer_capacity
from pxd.planning.model import Allocation, ModelCost, NodeOffer, PlanSettings
from pxd.planning.pipeline import plan_pipeline
from pxd.planning.waterfill import water_fill

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "allocation_vectors.json").read_text()
)


def model(layers: int) -> ModelCost:
    return ModelCost(
        layer_bytes=(VECTORS["layer_bytes"],) * layers,
        embedding_bytes=VECTORS["embedding_bytes"],
        head_bytes=VECTORS["head_bytes"],
        tied=False,
        kv_bytes_per_token=(VECTORS["kv_bytes_per_token"],) * layers,
        splits=tuple(range(1, layers)),
    )


def weights(gpu: str, share: float) -> int:
    return math.floor(VECTORS["gpus"][gpu]["memory_gib"] * 2**30 * share)


@pytest.mark.parametrize("gpu", VECTORS["capacities"])
def test_capacity_at_both_ends_of_the_model(gpu: str) -> None:
    room = weights(gpu, VECTORS["weight_share"])
    found = {
        "plain": layer_capacity(room, model(8), embedding=False, head=False),
        "embedding": layer_capacity(room, model(8), embedding=True, head=False),
        "head": layer_capacity(room, model(8), embedding=False, head=True),
        "both": layer_capacity(room, model(8), embedding=True, head=True),
    }
    assert found == VECTORS["capacities"][gpu]


def test_capacity_follows_the_weight_share() -> None:
    plain = [
        layer_capacity(weights(gpu, 0.65), model(8), embedding=False, head=False)
        for gpu in ("a100-80g", "a100-40g", "rtx5090", "rtx4090")
    ]
    assert plain == [17, 8, 6, 5]


@pytest.mark.parametrize("case", VECTORS["water_filling"])
def test_water_filling(case: dict[str, Any]) -> None:
    share = VECTORS["weight_share"]
    order = sorted(case["gpus"], key=lambda gpu: -weights(gpu, share))
    last = len(order) - 1
    capacities = [
        layer_capacity(weights(gpu, share), model(case["layers"]), embedding=i == 0, head=i == last)
        for i, gpu in enumerate(order)
    ]
    compute = [VECTORS["gpus"][gpu]["tflops"] for gpu in order]
    counts = water_fill(capacities, compute, case["layers"])
    assert counts is not None
    assert sorted(counts) == sorted(case["expected_counts_in_any_order"])
    assert all(count <= room for count, room in zip(counts, capacities, strict=True))


@pytest.mark.parametrize("case", VECTORS["water_filling"])
def test_the_planner_finds_the_same_split(case: dict[str, Any]) -> None:
    offers = [
        NodeOffer(
            id=f"{index}-{gpu}",
            memory=int(VECTORS["gpus"][gpu]["memory_gib"] * 2**30),
            tflops=VECTORS["gpus"][gpu]["tflops"],
        )
        for index, gpu in enumerate(case["gpus"])
    ]
    settings = PlanSettings(
        weight_share=VECTORS["weight_share"], kv_share=VECTORS["kv_share"], min_kv_tokens=1024
    )
    plan = plan_pipeline(model(case["layers"]), offers, settings)
    assert isinstance(plan, Allocation)
    counts = [stage.end - stage.start for stage in plan.stages]
    assert sorted(counts) == sorted(case["expected_counts_in_any_order"])
