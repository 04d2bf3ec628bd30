import statistics
from collections.abc import Sequence
from itertools import chain as joined
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.capacity import StageSizes, budget
from pxd.planning.classic.dynamic import dynamic
from pxd.planning.classic.greedy import greedy
from pxd.planning.classic.replication import LayerLoads, place_left_over
from pxd.planning.model import Chain, ModelCost, NodeOffer
from tests.planning.allocations import SETTINGS, Allocator, models, offers
from tests.planning.vectors import SHARES, VECTORS, gpus_of, model, offer
from tests.planning.vectors import offers as vector_offers

OTHER = VECTORS["allocators_other"]
SCRIPTS = {script["test"]: script for script in VECTORS["scheduler_scripts"]}
ALLOCATORS: dict[str, Allocator] = {"greedy": greedy, "dp": dynamic}


@pytest.mark.parametrize("case", OTHER, ids=lambda case: f"{case['test']}-{case['strategy']}")
def test_pipelines_and_left_overs(case: dict[str, Any]) -> None:
    cost, nodes = model(case["num_layers"]), vector_offers(gpus_of(case))
    chains = ALLOCATORS[case["strategy"]](cost, nodes, SHARES)
    placed = place_left_over(cost, nodes, chains, SHARES)
    stages = [*joined(*chains), *placed]
    names = [node for node, _, _ in stages]
    expected = case["expected"]
    assert bool(chains) == expected["ok"]
    assert len(set(names)) == len(names)
    if "ranges" in expected:
        assert sorted([start, end] for _, start, end in stages) == sorted(expected["ranges"])
    if "node_list_len" in expected:
        assert len(names) == expected["node_list_len"]
    if "sum_of_layers" in expected:
        assert len(names) >= expected["min_assigned_nodes"]
        layers = sum(end - start for _, start, end in joined(*chains))
        assert layers == expected["sum_of_layers"] * len(chains)


class Cluster:
    """Nodes that come and go as in the vectors' scheduler scripts."""

    def __init__(self, layers: int, strategy: str) -> None:
        self.model, self.allocate = model(layers), ALLOCATORS[strategy]
        self.nodes: dict[str, NodeOffer] = {}
        self.loads = LayerLoads(self.model, SHARES)

    def bootstrap(self, *nodes: NodeOffer) -> bool:
        self.nodes |= {node.id: node for node in nodes}
        everybody = list(self.nodes.values())
        chains = self.allocate(self.model, everybody, SHARES)
        self.loads = LayerLoads(self.model, SHARES)
        if chains:
            placed = place_left_over(self.model, everybody, chains, SHARES)
            for node, start, end in [*joined(*chains), *placed]:
                self.loads.host(self.nodes[node], start, end)
        return self.loads.covered

    def join(self, node: NodeOffer) -> None:
        self.nodes[node.id] = node
        assert self.loads.join(node) is not None

    def leave(self, node: str) -> None:
        self.loads.leave(node)
        del self.nodes[node]
        if self.loads.needs_rebalance():
            self.bootstrap()


def test_join_and_leave() -> None:
    script = SCRIPTS["join_and_leave"]
    cluster = Cluster(script["L"], script["strategy"])
    assert cluster.bootstrap(*(offer(*row[:3]) for row in script["initial"]))
    joining = offer(*script["join"][:3])
    cluster.join(joining)
    assert joining.id in cluster.loads.ranges
    cluster.leave(joining.id)
    assert joining.id not in cluster.loads.ranges


def test_bootstrap_then_join_then_leave_of_what_was_alone() -> None:
    script = SCRIPTS["bootstrap_wait_and_dynamic_events"]
    cluster = Cluster(script["L"], script["strategy"])
    first, second = offer("a100-0", 312.0, 80.0), offer("5090-1", 165.0, 32.0)
    assert cluster.bootstrap(first, second)
    cluster.join(offer("rtx4090-x", 82.6, 24.0))
    cluster.leave("rtx4090-x")
    assert cluster.loads.covered
    cluster.loads = LayerLoads(cluster.model, SHARES)
    cluster.loads.host(first, 0, 11)
    cluster.leave(first.id)
    assert not cluster.loads.covered


def test_a_single_node_leaves_and_comes_back() -> None:
    script = SCRIPTS["single_node_leave_then_rejoin"]
    cluster = Cluster(script["L"], script["strategy"])
    solo = offer(*script["node"])
    assert cluster.bootstrap(solo)
    cluster.leave(solo.id)
    assert not cluster.loads.covered
    cluster.join(solo)
    assert cluster.loads.ranges == {solo.id: (0, script["L"])}


def test_three_nodes_of_which_any_may_leave_and_come_back() -> None:
    script = SCRIPTS["three_nodes_sequential"]
    cluster = Cluster(script["L"], script["strategy"])
    nodes = [offer(*row[:3]) for row in script["nodes"]]
    assert not cluster.bootstrap(nodes[0])
    assert cluster.bootstrap(nodes[1])
    cluster.join(nodes[2])
    for node in nodes:
        cluster.leave(node.id)
        assert len(cluster.nodes) == 2
        assert cluster.loads.covered
        cluster.join(node)
        assert len(cluster.loads.ranges) == 3
        assert cluster.loads.covered
    layers = sum(end - start for start, end in cluster.loads.ranges.values())
    assert layers >= script["L"]


def small_model(layers: int, head: int = 0) -> ModelCost:
    """Layers of 10 bytes and KV; a node of 20·n + 2·ends bytes holds n of them."""
    return ModelCost(
        layer_bytes=(10,) * layers,
        embedding_bytes=10,
        head_bytes=head,
        tied=False,
        kv_bytes_per_token=(0,) * layers,
        splits=tuple(range(1, layers)),
    )


def test_a_joining_node_takes_the_lightest_layer_and_those_after_it() -> None:
    loads = LayerLoads(small_model(8, head=10), SETTINGS)
    loads.host(NodeOffer("a", 1000), 0, 3)
    loads.host(NodeOffer("b", 1000), 5, 8)
    assert loads.lightest_layer == 3
    assert loads.join(NodeOffer("c", 60)) == ("c", 3, 6)


def test_who_reaches_the_end_pays_for_the_head_and_who_begins_for_the_embedding() -> None:
    loads = LayerLoads(small_model(8, head=20), SETTINGS)
    loads.host(NodeOffer("a", 1000), 0, 5)
    assert loads.join(NodeOffer("b", 60)) == ("b", 5, 7)
    assert loads.join(NodeOffer("c", 60)) == ("c", 7, 8)
    assert LayerLoads(small_model(8), SETTINGS).join(NodeOffer("d", 60)) == ("d", 0, 2)


def test_who_cannot_hold_the_lightest_layer_begins_at_the_next() -> None:
    loads = LayerLoads(small_model(4), SETTINGS)
    assert loads.join(NodeOffer("a", 20)) == ("a", 1, 2)
    assert loads.join(NodeOffer("b", 19)) is None


def test_rebalance_when_no_pipeline_is_left_or_loads_differ_too_much() -> None:
    loads = LayerLoads(small_model(4), SETTINGS)
    assert loads.variation == 0
    assert loads.needs_rebalance()
    loads.host(NodeOffer("a", 1000), 0, 2)
    loads.host(NodeOffer("b", 1000), 2, 4)
    assert not loads.needs_rebalance()
    loads.host(NodeOffer("c", 1000), 0, 2)
    # Twice as much on one half: a third of the mean to either side.
    assert loads.variation == pytest.approx(1 / 3)
    assert loads.needs_rebalance()
    assert not loads.needs_rebalance(threshold=0.34)
    loads.leave("b")
    assert not loads.covered


def test_ranges_that_overlap_without_meeting_are_no_cover() -> None:
    loads = LayerLoads(small_model(4), SETTINGS)
    loads.host(NodeOffer("a", 1000), 0, 3)
    loads.host(NodeOffer("b", 1000), 2, 4)
    assert not loads.covered


def test_what_is_refused() -> None:
    loads = LayerLoads(small_model(4), SETTINGS)
    loads.host(NodeOffer("a", 1000), 0, 4)
    with pytest.raises(ValueError, match="already"):
        loads.join(NodeOffer("a", 1000))
    with pytest.raises(ValueError, match="holds no layers"):
        loads.leave("b")
    for start, end in ((-1, 2), (2, 2), (0, 5)):
        with pytest.raises(ValueError, match="no layers"):
            loads.host(NodeOffer("b", 1000), start, end)
    with pytest.raises(ValueError, match="no offer"):
        place_left_over(small_model(4), [], [(("a", 0, 4),)], SETTINGS)


def recount(cost: ModelCost, nodes: Sequence[NodeOffer], loads: LayerLoads) -> list[int]:
    sums = [0] * cost.layers
    for node in nodes:
        if node.id in loads.ranges:
            start, end = loads.ranges[node.id]
            for layer in range(start, end):
                sums[layer] += int(node.memory * SETTINGS.kv_share) // (end - start)
    return sums


@settings(max_examples=200, deadline=None)
@given(models(), offers(), st.data())
def test_sums_are_a_recount_and_leaving_undoes_joining(
    cost: ModelCost, nodes: list[NodeOffer], data: st.DataObject
) -> None:
    loads, sizes = LayerLoads(cost, SETTINGS), StageSizes(cost, SETTINGS.min_kv_tokens)
    for node in nodes:
        before, ranges = list(loads.loads), loads.ranges
        if loads.join(node) is None:
            assert loads.loads == before
            assert not sizes.holds_any(budget(node, cost, SETTINGS))
            continue
        assert sizes.fits(budget(node, cost, SETTINGS), *loads.ranges[node.id])
        if data.draw(st.booleans()):
            loads.leave(node.id)
            assert (loads.loads, loads.ranges) == (before, ranges)
        assert loads.loads == recount(cost, nodes, loads)
        if sum(loads.loads):
            variation = statistics.pstdev(loads.loads) / statistics.mean(loads.loads)
            assert loads.variation == pytest.approx(variation)


@settings(max_examples=100, deadline=None)
@given(models(), offers(), st.randoms(use_true_random=False))
def test_left_overs_do_not_depend_on_order(
    cost: ModelCost, nodes: list[NodeOffer], shuffler: Any
) -> None:
    chains: tuple[Chain, ...] = greedy(cost, nodes, SETTINGS)
    placed = place_left_over(cost, nodes, chains, SETTINGS)
    assert not {node for node, _, _ in placed} & {node for node, _, _ in joined(*chains)}
    shuffled = list(nodes)
    shuffler.shuffle(shuffled)
    assert place_left_over(cost, shuffled, chains, SETTINGS) == placed
