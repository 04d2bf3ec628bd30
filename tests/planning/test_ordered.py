from typing import Any

import pytest

from pxd.planning.classic.ordered import in_order
from pxd.planning.model import NodeOffer, PlanSettings
from tests.planning.clusters import GIB, model_of
from tests.planning.restated import Restated
from tests.planning.vectors import OTHER_SHARES, SHARES, VECTORS, model, offers

WATER_FILLING = VECTORS["water_filling"]
HALVES = PlanSettings(weight_share=0.5, kv_share=0.5, min_kv_tokens=1)


@pytest.mark.parametrize("case", WATER_FILLING)
def test_water_filling(case: dict[str, Any]) -> None:
    nodes = offers(case["gpus"])
    chain = in_order(model(case["num_layers"]), nodes, SHARES)
    assert chain is not None
    assert [node for node, _, _ in chain] == [node.id for node in nodes]
    counts = [end - start for _, start, end in chain]
    assert sorted(counts) == sorted(case["expected_multiset"])
    capacities = [VECTORS["capacities"][gpu]["plain"] for gpu in case["gpus"]]
    capacities[0] = VECTORS["capacities"][case["gpus"][0]]["embed"]
    capacities[-1] = VECTORS["capacities"][case["gpus"][-1]]["lm_head"]
    assert all(count <= room for count, room in zip(counts, capacities, strict=True))


@pytest.mark.parametrize("settings", [SHARES, OTHER_SHARES])
@pytest.mark.parametrize("case", WATER_FILLING)
def test_water_filling_follows_its_definition(case: dict[str, Any], settings: PlanSettings) -> None:
    cost, nodes = model(case["num_layers"]), offers(case["gpus"])
    assert in_order(cost, nodes, settings) == Restated(cost, nodes, settings).filled(nodes)


def test_the_first_node_pays_for_the_embedding_and_the_last_for_the_head() -> None:
    cost = model_of(4, 1.0, embedding_bytes=2 * GIB, head_bytes=GIB)
    small, large = NodeOffer("small", 4 * GIB, 1.0), NodeOffer("large", 11 * GIB, 9.0)
    assert in_order(cost, [large, small], HALVES) == (("large", 0, 3), ("small", 3, 4))
    assert in_order(cost, [small, large], HALVES) is None


def test_compute_that_is_not_known_counts_as_the_mean() -> None:
    nodes = [NodeOffer("a", 90 * GIB), NodeOffer("b", 90 * GIB, 30), NodeOffer("c", 90 * GIB, 10)]
    chain = in_order(model_of(12, 1.0), nodes, HALVES)
    assert chain == (("a", 0, 4), ("b", 4, 10), ("c", 10, 12))


def test_unequal_layers_are_cut_by_their_sizes() -> None:
    cost = model_of(5, layer_bytes=(5 * GIB, GIB, GIB, GIB, GIB), embedding_bytes=0, head_bytes=0)
    nodes = [NodeOffer("a", 10 * GIB, 1.0), NodeOffer("b", 8 * GIB, 1.0)]
    assert in_order(cost, nodes, HALVES) == (("a", 0, 1), ("b", 1, 5))


def test_nodes_that_cannot_hold_the_model_in_this_order_or_have_no_layer_to_take() -> None:
    assert in_order(model(14), offers(["rtx4090", "rtx4090"]), SHARES) is None
    assert in_order(model(2), offers(["rtx4090"] * 3), SHARES) is None
    assert in_order(model(2), [], SHARES) is None


def test_two_offers_of_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match="same node"):
        in_order(model(8), [NodeOffer("a", GIB), NodeOffer("a", GIB)], SHARES)
