import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.classic.greedy import greedy
from pxd.planning.model import ModelCost, NodeOffer, PlanSettings
from tests.planning.allocations import (
    SETTINGS,
    assert_order_does_not_matter,
    check,
    models,
    offers,
    with_small_ends,
)
from tests.planning.restated import Restated
from tests.planning.vectors import OTHER_SHARES, SHARES, VECTORS, by_kind, gpus_of, model, spans
from tests.planning.vectors import offers as vector_offers

CASES = [case for case in VECTORS["allocators"] if case["strategy"] == "greedy"]


@pytest.mark.parametrize("case", CASES)
def test_vectors(case: dict[str, Any]) -> None:
    chains = greedy(model(case["num_layers"]), vector_offers(gpus_of(case)), SHARES)
    assert spans(chains) == sorted(case["expected_ranges_multiset"])


@pytest.mark.parametrize("shares", [SHARES, OTHER_SHARES])
@pytest.mark.parametrize("case", VECTORS["allocators"] + VECTORS["allocators_other"])
def test_every_cluster_of_the_vectors_by_definition(
    case: dict[str, Any], shares: PlanSettings
) -> None:
    cost, nodes = model(case["num_layers"]), vector_offers(gpus_of(case))
    expected = Restated(cost, nodes, shares).greedy()
    assert by_kind(greedy(cost, nodes, shares)) == by_kind(expected)


@settings(max_examples=200, deadline=None)
@given(with_small_ends(most=12))
def test_random_clusters_by_definition(drawn: tuple[ModelCost, list[NodeOffer]]) -> None:
    cost, nodes = drawn
    expected = Restated(cost, nodes, SETTINGS).greedy()
    found = greedy(cost, nodes, SETTINGS)
    assert [[node for node, _, _ in chain] for chain in found] == [
        [node for node, _, _ in chain] for chain in expected
    ]


def test_a_node_that_holds_all_pays_for_both_ends() -> None:
    # Twelve layers fit beside both ends of an 80 GiB card, thirteen beside one of them.
    nodes = vector_offers(["a100-80g", "a100-80g"])
    assert spans(greedy(model(12), nodes, SHARES)) == [[0, 12], [0, 12]]
    assert spans(greedy(model(13), nodes, SHARES)) == [[0, 7], [7, 13]]


def test_a_small_node_alone_spares_the_large_ones_for_models_that_are_left() -> None:
    chains = greedy(model(5), vector_offers(["a100-80g", "a100-40g", "rtx4090"]), SHARES)
    assert by_kind(chains) == [[("a100-40g", 0, 5)], [("a100-80g", 0, 5)]]


def test_unequal_layers_get_one_more_node_where_the_mean_promised_too_much() -> None:
    cost = ModelCost(
        layer_bytes=(30, 30, 6, 6),
        embedding_bytes=0,
        head_bytes=0,
        tied=False,
        kv_bytes_per_token=(0,) * 4,
        splits=(1, 2, 3),
    )
    nodes = [NodeOffer(name, 74) for name in "abc"]
    assert [len(chain) for chain in greedy(cost, nodes, SETTINGS)] == [3]


def test_a_layer_that_no_node_can_hold() -> None:
    cost = ModelCost(
        layer_bytes=(100, 1, 1, 1),
        embedding_bytes=0,
        head_bytes=0,
        tied=False,
        kv_bytes_per_token=(0,) * 4,
        splits=(1, 2, 3),
    )
    assert greedy(cost, [NodeOffer(f"n{place}", 120) for place in range(9)], SETTINGS) == ()


@settings(max_examples=300, deadline=None)
@given(models(), offers(), st.randoms(use_true_random=False))
def test_valid_and_independent_of_order(
    cost: ModelCost, nodes: list[NodeOffer], shuffler: random.Random
) -> None:
    check(cost, nodes, greedy(cost, nodes, SETTINGS))
    assert_order_does_not_matter(greedy, cost, nodes, shuffler)


def test_two_offers_of_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match="same node"):
        greedy(model(8), [NodeOffer("a", 10), NodeOffer("a", 20)], SHARES)
