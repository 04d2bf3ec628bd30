import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.classic.canonical import Canonical, Capacity
from pxd.planning.classic.dynamic import (
    EXACT_NODES,
    balance,
    bounded_groups,
    dynamic,
    exact_groups,
)
from pxd.planning.classic.fitting import fit
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

CASES = [case for case in VECTORS["allocators"] if case["strategy"] == "dp"]


@pytest.mark.parametrize("case", CASES)
def test_vectors(case: dict[str, Any]) -> None:
    chains = dynamic(model(case["num_layers"]), vector_offers(gpus_of(case)), SHARES)
    assert spans(chains) == sorted(case["expected_ranges_multiset"])


@pytest.mark.parametrize("shares", [SHARES, OTHER_SHARES])
@pytest.mark.parametrize("case", VECTORS["allocators"] + VECTORS["allocators_other"])
def test_every_cluster_of_the_vectors_by_definition(
    case: dict[str, Any], shares: PlanSettings
) -> None:
    cost, nodes = model(case["num_layers"]), vector_offers(gpus_of(case))
    expected = Restated(cost, nodes, shares).dynamic()
    assert by_kind(dynamic(cost, nodes, shares)) == by_kind(expected)


@settings(max_examples=200, deadline=None)
@given(with_small_ends())
def test_small_clusters_by_definition_ties_and_all(
    drawn: tuple[ModelCost, list[NodeOffer]],
) -> None:
    cost, nodes = drawn
    expected = Restated(cost, nodes, SETTINGS).dynamic()
    found = dynamic(cost, nodes, SETTINGS)
    assert sorted([node for node, _, _ in chain] for chain in found) == sorted(
        [node for node, _, _ in chain] for chain in expected
    )


def test_what_greedy_misses() -> None:
    """Interleaved pipelines: (40, 20, 10) twice, where the largest first make one of two nodes."""
    cost = ModelCost(
        layer_bytes=(1,) * 70,
        embedding_bytes=0,
        head_bytes=0,
        tied=False,
        kv_bytes_per_token=(0,) * 70,
        splits=tuple(range(1, 70)),
    )
    sizes = (40, 40, 20, 20, 10, 10)
    nodes = [NodeOffer(f"n{place}", 2 * size) for place, size in enumerate(sizes)]
    assert len(greedy(cost, nodes, SETTINGS)) == 1
    assert [len(chain) for chain in dynamic(cost, nodes, SETTINGS)] == [3, 3]


@settings(max_examples=300, deadline=None)
@given(models(), offers(EXACT_NODES + 8), st.randoms(use_true_random=False))
def test_valid_independent_of_order_and_never_worse_than_greedy(
    cost: ModelCost, nodes: list[NodeOffer], shuffler: random.Random
) -> None:
    found = dynamic(cost, nodes, SETTINGS)
    check(cost, nodes, found)
    assert balance(found) >= balance(greedy(cost, nodes, SETTINGS))
    assert_order_does_not_matter(dynamic, cost, nodes, shuffler)


def valid_groups(inputs: Canonical, groups: list[list[int]]) -> bool:
    """Equal layers: every group can be cut exactly where the counts say so."""
    return all(inputs.cut(group) is not None for group in groups)


@settings(max_examples=200, deadline=None)
@given(with_small_ends(most=EXACT_NODES))
def test_the_bounded_form_finds_real_pipelines_and_none_beyond_the_optimum(
    drawn: tuple[ModelCost, list[NodeOffer]],
) -> None:
    inputs = Canonical(*drawn, SETTINGS)
    best = exact_groups(inputs.capacities, inputs.pieces)
    found = bounded_groups(inputs.capacities, inputs.pieces)
    assert valid_groups(inputs, best)
    assert valid_groups(inputs, found)
    assert balance(found) <= balance(best)
    for pairs in (False, True):
        fitted = fit(inputs.capacities, inputs.pieces, pairs=pairs)
        assert valid_groups(inputs, fitted)
        assert balance(fitted) <= balance(found)


def random_capacities(rng: random.Random, nodes: int, pieces: int) -> list[Capacity]:
    plain = sorted((rng.randint(2, pieces * 2 // 3) for _ in range(nodes)), reverse=True)
    return [Capacity(size, size - (size % 2), size - (size % 2), size - 1) for size in plain]


def test_the_bounded_form_is_mostly_the_optimum() -> None:
    rng = random.Random(3)
    ratios = []
    for _ in range(60):
        pieces = rng.choice([12, 24, 36, 61])
        capacities = random_capacities(rng, EXACT_NODES, pieces)
        best = balance(exact_groups(capacities, pieces))
        ratios.append(balance(bounded_groups(capacities, pieces)) / best if best else 1)
    assert sum(ratio == 1 for ratio in ratios) >= 0.9 * len(ratios)
    assert min(ratios) > 0.8


@pytest.mark.parametrize("nodes", [100, 1000])
def test_many_mixed_nodes(nodes: int) -> None:
    rng = random.Random(nodes)
    kinds = [8, 12, 16, 24, 32, 48, 64, 80, 96, 141, 192]
    cluster = [
        NodeOffer(f"n{place}", int(rng.choice(kinds) * rng.uniform(0.8, 1) * 2**30), 10.0)
        for place in range(nodes)
    ]
    cost = model(36)
    found = dynamic(cost, cluster, SHARES)
    check(cost, cluster, found)
    assert balance(found) > balance(greedy(cost, cluster, SHARES))


def test_two_offers_of_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match="same node"):
        dynamic(model(8), [NodeOffer("a", 10), NodeOffer("a", 20)], SHARES)
