import math
import random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.links import Link, Links
from pxd.planning.routing.cost import DecodeCost, Hosted, NodeLoad, ReferenceCost, RouteCost
from pxd.planning.routing.shortest import NO_PATH, RouteGraph, shortest_path
from tests.planning.routing_cases import (
    LAYERS,
    ROUTING,
    all_chains,
    case,
    chain_cost,
    costs,
    host_lists,
    no_rtt,
    ranges,
    vector_cost,
    vector_hosts,
)


@pytest.mark.parametrize("vector", ROUTING["dp_shortest_path"], ids=lambda one: one["test"])
def test_shortest_path_of_the_reference(vector: dict[str, Any]) -> None:
    nodes = vector["nodes"]
    if vector["test"] == "optimal_path_missing_rtt":
        # Its note: a measured reverse counts, so both directions must be missing.
        nodes = [{**node, "rtt": {}} for node in nodes]
    path = shortest_path(vector_hosts(nodes), vector["num_layers"], vector_cost(nodes))
    assert list(path.nodes) == vector["expected_path"]
    assert path.latency == pytest.approx(float(vector["observed_latency_ms"]) / 1e3, rel=1e-6)


def test_an_rtt_measured_in_one_direction_counts_for_the_other() -> None:
    vector = case("dp_shortest_path", "optimal_path_missing_rtt")
    assert [list(node["rtt"]) for node in vector["nodes"]] == [[], ["n1"]]
    path = shortest_path(vector_hosts(vector["nodes"]), 12, vector_cost(vector["nodes"]))
    assert path.nodes == ("n1", "n2")
    assert path.latency == pytest.approx(0.2 + 2 * 0.0021958656)


def test_the_reference_spreads_the_ends_over_the_layers_and_counts_a_node_once() -> None:
    # From the vectors: five layers with an end, six layers with an end, five without.
    cost = ReferenceCost({})
    assert cost.stage(Hosted("a", 0, 5, 0.2654208, 11.5826688)) == pytest.approx(2.58195456)
    assert cost.stage(Hosted("a", 0, 6, 0.2654208, 11.5826688)) == pytest.approx(2.1958656)
    assert cost.stage(Hosted("a", 5, 10, 0.2654208)) == pytest.approx(0.2654208)


def test_measured_latency_beats_the_roofline_and_grows_with_the_load_in_the_reference() -> None:
    host = Hosted("a", 0, 5, layer_s=1.0, ends_s=1.0, measured_s=0.002)
    cost = ReferenceCost({}, {"a": NodeLoad(requests=4, max_requests=16)})
    assert cost.stage(host) == pytest.approx(0.002 + 4 * 0.05e-3)
    assert ReferenceCost({}).stage(host) == 0.002


@pytest.mark.parametrize("load", [NodeLoad(16, 16), NodeLoad(17, 16), NodeLoad(0, 16, alive=False)])
def test_nobody_is_sent_to_a_node_that_is_overloaded_or_dead(load: NodeLoad) -> None:
    host = Hosted("a", 0, 5, 1.0, measured_s=1.0)
    assert ReferenceCost({}, {"a": load}).stage(host) == math.inf
    assert DecodeCost(Links(), 0, {"a": load}).stage(host) == math.inf
    assert shortest_path([host], 5, ReferenceCost({}, {"a": load})) == NO_PATH


def test_the_decode_cost_counts_layers_ends_hops_bytes_and_the_way_home() -> None:
    hosts = [Hosted("a", 0, 3, 0.01, 0.002), Hosted("b", 3, 7, 1.0, 1.0, measured_s=0.02)]
    links = Links([Link("a", "b", rtt=0.006, bandwidth=0.5), Link("b", "a", rtt=0.008)])
    path = shortest_path(hosts, 7, DecodeCost(links, position_bytes=500_000))
    stages = 3 * 0.01 + 0.002 + 4 * 0.02
    onward, home = links.transfer("a", "b", 500_000), links.transfer("b", "a", 0)
    assert onward - home == pytest.approx((0.006 - 0.008) / 2 + 0.001)
    assert path.latency == pytest.approx(stages + onward + home)


def test_one_node_has_no_way_home() -> None:
    assert shortest_path([Hosted("a", 0, 4, 0.25)], 4, DecodeCost(Links(), 1e9)).latency == 1.0


def test_the_way_home_decides_which_tail_is_best() -> None:
    hosts = ranges({"head": [0, 2], "far": [2, 4], "near": [2, 4]})
    links = Links([Link("head", "far", 0.001), Link("far", "head", 1.0), Link("head", "near", 0.1)])
    assert shortest_path(hosts, 4, DecodeCost(links, 0)).nodes == ("head", "near")


def test_the_decode_cost_prefers_fast_layers_where_the_reference_sees_fewer_nodes() -> None:
    hosts = [Hosted("slow", 0, 4, 0.3), Hosted("a", 0, 2, 0.2), Hosted("b", 2, 4, 0.2)]
    assert shortest_path(hosts, 4, no_rtt(hosts)).nodes == ("slow",)
    assert shortest_path(hosts, 4, DecodeCost(Links(), 0)).nodes == ("a", "b")


def test_no_path_through_nothing_or_over_a_gap() -> None:
    assert shortest_path([], 4, ReferenceCost({})) == NO_PATH
    hosts = ranges({"a": [0, 2], "b": [3, 4], "c": [2, 3]})
    assert shortest_path(hosts[:2], 4, no_rtt(hosts)) == NO_PATH
    assert shortest_path(hosts, 4, no_rtt(hosts)).nodes == ("a", "c", "b")


@pytest.mark.parametrize("span", [(0, 999), (-1, 2), (2, 2), (3, 1), (4, 5)])
def test_a_range_that_is_not_the_models_is_refused(span: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match="no range of a model with 4"):
        shortest_path([Hosted("a", 0, 4), Hosted("b", *span)], 4, ReferenceCost({}))


def test_a_model_without_layers_is_refused() -> None:
    with pytest.raises(ValueError, match="one or more layers"):
        shortest_path([], 0, ReferenceCost({}))


def test_two_ranges_of_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match="two ranges"):
        shortest_path([Hosted("a", 0, 2), Hosted("a", 2, 4)], 4, ReferenceCost({}))


@pytest.mark.parametrize("seconds", [(-1.0, 0.0, 0.0), (0.0, math.nan, 0.0), (0.0, 0.0, -0.1)])
def test_latencies_must_be_times(seconds: tuple[float, float, float]) -> None:
    with pytest.raises(ValueError, match="'a'"):
        Hosted("a", 0, 2, *seconds)


@settings(max_examples=300)
@given(host_lists(), costs)
def test_shortest_is_the_cheapest_of_all_chains(hosts: list[Hosted], cost: RouteCost) -> None:
    chains = list(all_chains(hosts, LAYERS))
    path = shortest_path(hosts, LAYERS, cost)
    best = min((chain_cost(chain, cost) for chain in chains), default=math.inf)
    assert path.latency == pytest.approx(best)
    if path == NO_PATH:
        assert best == math.inf
    else:
        taken = {tuple(host.node for host in chain): chain for chain in chains}[path.nodes]
        assert chain_cost(taken, cost) == pytest.approx(best)


@settings(max_examples=200)
@given(host_lists(), costs, st.sets(st.integers(0, 8).map("n{}".format)))
def test_each_heads_best_path_past_taken_nodes(
    hosts: list[Hosted], cost: RouteCost, taken: set[str]
) -> None:
    graph = RouteGraph(hosts, LAYERS, cost)
    for head, path in zip(graph.heads, graph.cheapest(graph.heads, taken), strict=True):
        chains = [
            chain
            for chain in all_chains(hosts, LAYERS)
            if chain[0].node == head and taken.isdisjoint(host.node for host in chain)
        ]
        best = min((chain_cost(chain, cost) for chain in chains), default=math.inf)
        assert path.latency == pytest.approx(best)
        assert taken.isdisjoint(path.nodes)
        assert graph.cheapest([head], taken) == [path]


@given(host_lists(), costs, st.randoms(use_true_random=False))
def test_the_order_of_hosts_does_not_matter(
    hosts: list[Hosted], cost: RouteCost, shuffler: random.Random
) -> None:
    shuffled = list(hosts)
    shuffler.shuffle(shuffled)
    assert shortest_path(shuffled, LAYERS, cost) == shortest_path(hosts, LAYERS, cost)


def test_a_thousand_nodes_are_searched_in_blocks() -> None:
    """Three groups of 333 equal nodes but one each: 37 million chains, one of them best."""
    hosts = [Hosted(f"n{i:03}", i % 3, i % 3 + 1, 0.001) for i in range(999)]
    fast = {500, 700, 900}
    hosts = [
        Hosted(host.node, host.start, host.end, 0.0005 if i in fast else 0.001)
        for i, host in enumerate(hosts)
    ]
    assert {i % 3 for i in fast} == {0, 1, 2}
    assert set(shortest_path(hosts, 3, DecodeCost(Links(), 0)).nodes) == {"n500", "n700", "n900"}
