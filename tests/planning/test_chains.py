import random
import re
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.links import Link, Links
from pxd.planning.routing.chains import candidate_chains, count_chains, disjoint_chains
from pxd.planning.routing.cost import DecodeCost, Hosted, ReferenceCost, RouteCost
from pxd.planning.routing.shortest import shortest_path
from tests.planning.routing_cases import (
    LAYERS,
    MANAGEMENT,
    all_chains,
    case,
    chain_cost,
    costs,
    host_lists,
    no_rtt,
    ranges,
)


def groups(text: str, latency_s: float) -> list[Hosted]:
    """Hosts from a vector's "6x[0,9) 5x[9,18)"."""
    spans = re.findall(r"(\d+)x\[(\d+),(\d+)\)", text)
    return [
        Hosted(f"{start}-{end}.{i}", int(start), int(end), latency_s)
        for count, start, end in spans
        for i in range(int(count))
    ]


@pytest.mark.parametrize("test", ["num_full_pipelines", "num_full_pipelines_2"])
def test_number_of_full_pipelines(test: str) -> None:
    vector = MANAGEMENT[test]
    assert count_chains(ranges(vector["active"]), vector["L"]) == vector["expected"]


def test_only_active_nodes_make_pipelines() -> None:
    vector = MANAGEMENT["respects_active_state"]
    active: dict[str, list[int]] = {}
    for step, expected in vector["expected"]:
        node = step.removeprefix("activate ")
        active[node] = vector["nodes"][node]
        assert count_chains(ranges(active), vector["L"]) == expected


def test_a_node_without_layers_is_ignored_and_one_with_impossible_layers_refused() -> None:
    vector = MANAGEMENT["invalid_range_raises"]
    allocated = {node: span for node, span in vector["active"].items() if span is not None}
    with pytest.raises(ValueError, match=r"'n3' has layers \[0, 999\)"):
        count_chains(ranges(allocated), vector["L"])
    del allocated["n3"]
    assert count_chains(ranges(allocated), vector["L"]) == 1


def test_discovery_of_overlapping_pipelines() -> None:
    vector = case("round_robin", "pipeline_discovery_overlapping")
    hosts = ranges(vector["ranges"])
    found = set(candidate_chains(hosts, vector["num_layers"]))
    assert found == {("h1", "m1", "t1"), ("h2", "m3", "t2")}
    chains = disjoint_chains(hosts, vector["num_layers"], no_rtt(hosts))
    assert {chain.nodes for chain in chains} == found


def test_24_nodes_have_756_chains_and_6_disjoint_pipelines() -> None:
    vector = case("head_only", "rr_24_node_topology")
    hosts = groups(vector["nodes"], 0.010)
    assert len(hosts) == 24
    found = list(candidate_chains(hosts, 36))
    assert len(set(found)) == len(found) == count_chains(hosts, 36) == 756
    chains = disjoint_chains(hosts, 36, no_rtt(hosts))
    assert len(chains) == 6
    assert {node for chain in chains for node in chain.nodes} == {host.node for host in hosts}


def test_9_candidates_give_3_pipelines_without_overlap() -> None:
    vector = case("head_only", "rr_no_overlap_three_pipelines")
    hosts = groups("3x[0,20) 3x[20,40)", 0.001)
    assert vector["nodes"].startswith("3x[0,20) h0..h2, 3x[20,40)")
    assert len(list(candidate_chains(hosts, 40))) == count_chains(hosts, 40) == 9
    chains = disjoint_chains(hosts, 40, no_rtt(hosts))
    assert len(chains) == 3
    assert len({node for chain in chains for node in chain.nodes}) == 6


def diversity(*, roofline_s: dict[str, float] | None = None) -> list[Hosted]:
    """The vector's nodes; those in `roofline_s` with that instead of their measured latency."""
    nodes = case("head_only", "round_robin_pipeline_diversity")["nodes"]
    hosts = [Hosted(node, a, b, measured_s=ms / 1e3) for node, (a, b, ms) in nodes.items()]
    if roofline_s:
        hosts.append(Hosted("t2", 2, 3, measured_s=0.001))
        hosts = [
            Hosted(host.node, host.start, host.end, roofline_s[host.node])
            if host.node in roofline_s
            else host
            for host in hosts
        ]
    return hosts


def test_the_fastest_head_goes_first_and_takes_its_best_chain() -> None:
    hosts = diversity()
    chains = disjoint_chains(hosts, 3, no_rtt(hosts))
    assert [chain.nodes for chain in chains] == [("h2", "m1", "t1")]
    assert chains[0].latency == pytest.approx(0.003)


@pytest.mark.parametrize(
    "roofline_s",
    [
        {"h2": 0.0118480896, "m1": 0.0002654208, "t1": 0.0118480896},  # of the vectors' 100 GB/s
        {"h2": 0.002, "m1": 0.002, "t1": 0.002},
        {"h2": 0.0069, "m1": 0.0069, "t1": 0.0069},
    ],
)
def test_the_second_pipeline_makes_do_with_what_is_left(roofline_s: dict[str, float]) -> None:
    hosts = diversity(roofline_s=roofline_s)
    rtts = {(a.node, b.node): 0.0 for a in hosts for b in hosts}
    rtts |= {("m2", "t2"): 0.004, ("t2", "m2"): 0.004}
    chains = disjoint_chains(hosts, 3, ReferenceCost(rtts))
    assert [chain.nodes for chain in chains] == [("h1", "m1", "t2"), ("h2", "m2", "t1")]


def test_neighbours_in_the_network_go_together() -> None:
    hosts = ranges({"a": [0, 1], "b": [0, 1], "c": [1, 2], "d": [1, 2]})
    links = Links([Link("a", "d", 0.001), Link("b", "c", 0.001), Link("a", "c", 0.1)])
    chains = disjoint_chains(hosts, 2, DecodeCost(links, 0))
    assert [chain.nodes for chain in chains] == [("a", "d"), ("b", "c")]


def test_candidates_stop_at_the_limit() -> None:
    """A hundred stages with two nodes each have 2^100 chains."""
    hosts = [Hosted(f"{i:03}{side}", i, i + 1) for i in range(100) for side in "ab"]
    assert count_chains(hosts, 100) == 2**100
    assert len(set(candidate_chains(hosts, 100, limit=500))) == 500
    assert len(disjoint_chains(hosts, 100, DecodeCost(Links(), 0))) == 2


def test_dead_ends_cost_nothing() -> None:
    """As above, but the last layer is missing: walking on until there would never end."""
    hosts = [Hosted(f"{i:03}{side}", i, i + 1) for i in range(100) for side in "ab"]
    assert list(candidate_chains(hosts, 101)) == []
    assert disjoint_chains(hosts, 101, DecodeCost(Links(), 0)) == ()


@given(host_lists())
def test_candidates_are_all_chains(hosts: list[Hosted]) -> None:
    expected = {tuple(host.node for host in chain) for chain in all_chains(hosts, LAYERS)}
    found = list(candidate_chains(hosts, LAYERS))
    assert set(found) == expected
    assert len(found) == len(expected) == count_chains(hosts, LAYERS)
    assert list(candidate_chains(hosts, LAYERS, limit=2)) == found[:2]


@settings(max_examples=300)
@given(host_lists(), costs)
def test_pipelines_are_disjoint_and_cover_the_model(hosts: list[Hosted], cost: RouteCost) -> None:
    by_id = {host.node: host for host in hosts}
    chains = disjoint_chains(hosts, LAYERS, cost)
    used = [node for chain in chains for node in chain.nodes]
    assert len(set(used)) == len(used)
    for chain in chains:
        stages = tuple(by_id[node] for node in chain.nodes)
        assert (stages[0].start, stages[-1].end) == (0, LAYERS)
        assert all(a.end == b.start for a, b in pairwise(stages))
        assert chain.latency == pytest.approx(chain_cost(stages, cost))


@settings(max_examples=200)
@given(host_lists(), costs)
def test_the_first_pipeline_is_the_best_and_none_is_left_over(
    hosts: list[Hosted], cost: RouteCost
) -> None:
    chains = disjoint_chains(hosts, LAYERS, cost)
    assert chains[:1] == (shortest_path(hosts, LAYERS, cost),) or not chains
    used = {node for chain in chains for node in chain.nodes}
    rest = [host for host in hosts if host.node not in used]
    assert shortest_path(rest, LAYERS, cost).nodes == ()


@settings(max_examples=200)
@given(host_lists(), st.permutations(range(9)))
def test_each_head_in_turn_takes_its_cheapest_chain_of_what_is_left(
    hosts: list[Hosted], order: list[int]
) -> None:
    # Powers of two: no two chains cost the same.
    hosts = [
        Hosted(host.node, host.start, host.end, 2.0**power)
        for host, power in zip(hosts, order, strict=False)
    ]
    cost = no_rtt(hosts)
    chains = sorted(all_chains(hosts, LAYERS), key=lambda chain: chain_cost(chain, cost))
    expected: list[tuple[str, ...]] = []
    for head in dict.fromkeys(chain[0] for chain in chains):
        taken = {node for chain in expected for node in chain}
        for chain in chains:
            nodes = tuple(host.node for host in chain)
            if chain[0] == head and taken.isdisjoint(nodes):
                expected.append(nodes)
                break
    assert [chain.nodes for chain in disjoint_chains(hosts, LAYERS, cost)] == expected


@given(host_lists(), costs, st.randoms(use_true_random=False))
def test_the_order_of_hosts_does_not_matter(
    hosts: list[Hosted], cost: RouteCost, shuffler: random.Random
) -> None:
    shuffled = list(hosts)
    shuffler.shuffle(shuffled)
    assert disjoint_chains(shuffled, LAYERS, cost) == disjoint_chains(hosts, LAYERS, cost)
