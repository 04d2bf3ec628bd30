"""The vectors' scheduler scripts with whole plans: pipelines, active nodes and those on standby.

`test_replication` plays those of them that are about the ranges of single nodes.
"""

from typing import Any

import pytest

from pxd.planning.classic.replication import LayerLoads
from pxd.planning.links import Links
from pxd.planning.model import Chain, NodeOffer
from pxd.planning.replan import replan
from pxd.planning.result import ClusterPlan, PlanInputs, Strategy
from pxd.planning.routing.cost import DecodeCost, Hosted
from pxd.planning.routing.shortest import shortest_path
from tests.planning.clusters import chains_of, check_plan
from tests.planning.vectors import SHARES, VECTORS, model, offer

SCRIPTS: dict[str, dict[str, Any]] = {
    script["test"]: script for script in VECTORS["scheduler_scripts"]
}
EVERY: tuple[Strategy, ...] = ("greedy", "dp", "auto")


class Cluster:
    """Nodes that come and go; the plan follows them."""

    def __init__(self, script: dict[str, Any], strategy: Strategy) -> None:
        self.model, self.strategy = model(script["L"]), strategy
        self.nodes: dict[str, NodeOffer] = {}
        self.plan = ClusterPlan()

    def join(self, *nodes: NodeOffer) -> None:
        self.nodes |= {node.id: node for node in nodes}
        self._follow()

    def leave(self, *nodes: str) -> None:
        for node in nodes:
            del self.nodes[node]
        self._follow()

    def _follow(self) -> None:
        inputs = PlanInputs(model=self.model, offers=tuple(self.nodes.values()), settings=SHARES)
        spares = self.plan.spares
        move = replan(self.chains, inputs, self.strategy, spares=spares, grow=False).move
        check_plan(inputs, move.plan)
        self.plan = move.plan

    @property
    def chains(self) -> tuple[Chain, ...]:
        return chains_of(self.plan)

    @property
    def counts(self) -> tuple[int, int, int]:
        """Pipelines, nodes in them, nodes on standby."""
        active = sum(len(chain) for chain in self.chains)
        return len(self.chains), active, len(self.plan.spares)


def hosted(cluster: Cluster) -> LayerLoads:
    loads = LayerLoads(cluster.model, SHARES)
    for chain in cluster.chains:
        for node, start, end in chain:
            loads.host(cluster.nodes[node], start, end)
    return loads


pytestmark = pytest.mark.parametrize("strategy", EVERY)


def test_initialize_and_dispatch(strategy: Strategy) -> None:
    script = SCRIPTS["initialize_and_dispatch"]
    cluster = Cluster(script, strategy)
    cluster.join(*(offer(*row[:3]) for row in script["nodes"]))
    stages = [stage for chain in cluster.chains for stage in chain]
    assert sum(end - start for _, start, end in stages) >= script["L"]
    hosts = [Hosted(node, start, end, 0.001) for node, start, end in stages]
    path = shortest_path(hosts, script["L"], DecodeCost(Links(), 5760))
    assert path.nodes
    assert path.latency >= 0


def test_join_and_leave(strategy: Strategy) -> None:
    script = SCRIPTS["join_and_leave"]
    cluster = Cluster(script, strategy)
    cluster.join(*(offer(*row[:3]) for row in script["initial"]))
    before = cluster.plan
    joining = offer(*script["join"][:3])
    cluster.join(joining)
    # Of the pipelines here, each one node with all layers, it can take no stage: it only waits.
    assert [spare.node for spare in cluster.plan.spares] == [joining.id]
    assert hosted(cluster).join(joining) is not None
    cluster.leave(joining.id)
    assert cluster.plan == before


def test_who_comes_later_stands_by_and_may_leave(strategy: Strategy) -> None:
    # The script waits for two nodes before it begins; the first alone could serve already.
    cluster = Cluster(SCRIPTS["bootstrap_wait_and_dynamic_events"], strategy)
    cluster.join(offer("a100-0", 312.0, 80.0), offer("5090-1", 165.0, 32.0))
    pipelines, _, _ = cluster.counts
    assert pipelines == 1
    cluster.join(offer("rtx4090-x", 82.6, 24.0))
    (spare,) = (spare for spare in cluster.plan.spares if spare.node == "rtx4090-x")
    assert (spare.start, spare.end) == (0, 0)
    cluster.leave("rtx4090-x")
    assert cluster.counts[0] == 1
    cluster.leave("a100-0")
    assert cluster.counts == (0, 0, 1)


def test_a_single_node_leaves_and_comes_back(strategy: Strategy) -> None:
    script = SCRIPTS["single_node_leave_then_rejoin"]
    cluster, solo = Cluster(script, strategy), offer(*script["node"])
    cluster.join(solo)
    assert cluster.chains == (((solo.id, 0, script["L"]),),)
    cluster.leave(solo.id)
    assert cluster.counts == (0, 0, 0)
    cluster.join(solo)
    assert cluster.chains == (((solo.id, 0, script["L"]),),)


def test_any_of_three_nodes_may_leave_and_come_back(strategy: Strategy) -> None:
    script = SCRIPTS["three_nodes_sequential"]
    cluster = Cluster(script, strategy)
    first, second, third = (offer(*row[:3]) for row in script["nodes"])
    cluster.join(first)
    assert cluster.counts == (0, 0, 1)
    cluster.join(second)
    assert cluster.counts == (1, 2, 0)
    cluster.join(third)
    assert cluster.counts == (1, 2, 1)
    for node in (first, second, third):
        cluster.leave(node.id)
        assert cluster.counts == (1, 2, 0)
        cluster.join(node)
        assert cluster.counts == (1, 2, 1)
        assert all(spare.start < spare.end for spare in cluster.plan.spares)


def test_one_of_two_nodes_that_are_needed_stands_by(strategy: Strategy) -> None:
    cluster = Cluster(SCRIPTS["HEAD snapshot_standby"], strategy)
    cluster.join(offer("one", 312.0, 40.0))
    assert cluster.counts == (0, 0, 1)
    assert cluster.plan.estimates == ()
    assert cluster.plan.shortage is not None
    cluster.join(offer("two", 312.0, 40.0))
    assert cluster.counts == (1, 2, 0)


def test_a_second_node_that_holds_everything_is_a_second_pipeline(strategy: Strategy) -> None:
    script = SCRIPTS["HEAD rr_expand_pipelines"]
    cluster = Cluster(script, strategy)
    cluster.join(offer("one", 312.0, script["mem_gb"]))
    assert cluster.counts == (1, 1, 0)
    cluster.join(offer("two", 312.0, script["mem_gb"]))
    assert cluster.counts == (2, 2, 0)


def test_complicated_round_robin(strategy: Strategy) -> None:
    script = SCRIPTS["HEAD complicated_rr"]
    n1, n2, n3, n4 = (offer(f"n{i + 1}", 312.0, script["mem_gb"]) for i in range(script["nodes"]))
    cluster = Cluster(script, strategy)
    cluster.join(n1, n2)
    assert cluster.counts == (1, 2, 0)
    cluster.join(n3)
    assert cluster.counts == (1, 2, 1)
    cluster.join(n4)
    assert cluster.counts == (2, 4, 0)
    cluster.leave("n3")
    assert cluster.counts == (1, 2, 1)
    cluster.join(n3)
    assert cluster.counts == (2, 4, 0)
    # The script's n1 and n4 are of different pipelines.
    one_of_each = [chain[0][0] for chain in cluster.chains]
    cluster.leave(*one_of_each)
    assert cluster.counts == (1, 2, 0)
