"""The reference's routing vectors as hosts, and drawn hosts."""

from collections.abc import Iterator
from itertools import pairwise
from typing import Any

from hypothesis import strategies as st

from pxd.planning.links import Link, Links
from pxd.planning.routing.cost import DecodeCost, Hosted, NodeLoad, ReferenceCost, RouteCost
from tests.planning.vectors import VECTORS

ROUTING = VECTORS["routing"]
MANAGEMENT = {case["test"]: case for case in VECTORS["node_management"]}


def case(group: str, test: str) -> dict[str, Any]:
    return next(one for one in ROUTING[group] if one["test"] == test)


def vector_hosts(nodes: list[dict[str, Any]]) -> list[Hosted]:
    rows = [(node["id"], node["range"], node["layer_latency_ms"] / 1e3) for node in nodes]
    return [Hosted(name, start, end, layer_s) for name, (start, end), layer_s in rows]


def vector_cost(nodes: list[dict[str, Any]]) -> ReferenceCost:
    return ReferenceCost(
        {(node["id"], other): ms / 1e3 for node in nodes for other, ms in node["rtt"].items()}
    )


def ranges(named: dict[str, list[int]], layer_s: float = 0.001) -> list[Hosted]:
    return [Hosted(node, start, end, layer_s) for node, (start, end) in named.items()]


def no_rtt(hosts: list[Hosted]) -> ReferenceCost:
    return ReferenceCost({(a.node, b.node): 0.0 for a in hosts for b in hosts})


def all_chains(hosts: list[Hosted], layers: int, start: int = 0) -> Iterator[tuple[Hosted, ...]]:
    """Every chain, by trying everything."""
    if start == layers:
        yield ()
    for host in hosts:
        if host.start == start:
            yield from ((host, *rest) for rest in all_chains(hosts, layers, host.end))


def chain_cost(chain: tuple[Hosted, ...], cost: RouteCost) -> float:
    hops = sum(cost.hop(a, b) for a, b in pairwise(chain))
    return sum(map(cost.stage, chain)) + hops + cost.home(chain[-1], chain[0])


LAYERS = 5


@st.composite
def host_lists(draw: st.DrawFn) -> list[Hosted]:
    """Up to nine hosts of a model with LAYERS; latencies often equal, so that ties happen."""
    spans = draw(
        st.lists(
            st.tuples(st.integers(0, LAYERS - 1), st.integers(1, 3), st.integers(0, 3)),
            max_size=9,
        )
    )
    return [
        Hosted(f"n{i}", start, min(LAYERS, start + length), layer_s, 0.5)
        for i, (start, length, layer_s) in enumerate(spans)
    ]


node_ids = st.integers(0, 8).map("n{}".format)
load_maps = st.dictionaries(
    node_ids, st.builds(NodeLoad, st.integers(0, 2), st.just(2), st.booleans()), max_size=3
)
link_lists = st.lists(st.builds(Link, node_ids, node_ids, st.integers(0, 3), st.integers(0, 2)))
costs = st.one_of(
    st.builds(
        ReferenceCost,
        st.dictionaries(st.tuples(node_ids, node_ids), st.integers(0, 3).map(float)),
        load_maps,
    ),
    st.builds(DecodeCost, link_lists.map(Links), st.sampled_from([0.0, 1e9]), load_maps),
)
