import math
from collections.abc import Sequence
from itertools import pairwise, product
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.classic.turning import TurningPoint, turning_points
from pxd.planning.routing.cost import Hosted
from tests.planning.vectors import VECTORS

RttMs = dict[tuple[str, str], float]


def points(hosts: Sequence[Hosted], rtt: RttMs, layers: int) -> set[TurningPoint]:
    return turning_points(hosts, lambda a, b: rtt.get((a, b), math.inf), layers)


@pytest.mark.parametrize("case", VECTORS["routing"]["turning_points"])
def test_vectors(case: dict[str, Any]) -> None:
    rows = [(node["id"], node["range"], node["layer_latency_ms"]) for node in case["nodes"]]
    hosts = [Hosted(name, start, end, layer_ms) for name, (start, end), layer_ms in rows]
    rtt = {(n["id"], other): ms for n in case["nodes"] for other, ms in n["rtt"].items()}
    expected = {(node, layer, kind) for node, layer, kind in case["expected_set"]}
    assert points(hosts, rtt, case["num_layers"]) == expected


def test_a_measured_latency_beats_the_roofline() -> None:
    slow = Hosted("a", 0, 6, layer_s=0.1, measured_s=9.0)
    fast = Hosted("b", 3, 8, layer_s=9.0, measured_s=0.1)
    assert points([slow, fast], {("a", "b"): 0.1}, 8) == {("a", 3, "tail")}


def test_a_node_that_the_path_comes_back_to_keeps_what_lies_between() -> None:
    around, short = Hosted("around", 0, 9, layer_s=5.0), Hosted("short", 3, 6, layer_s=0.1)
    rtt = {("around", "short"): 1.0, ("short", "around"): 1.0}
    assert points([around, short], rtt, 9) == set()


def test_equally_fast_paths_change_nodes_as_little_as_possible() -> None:
    hosts = [Hosted(node, 0, 4, layer_s=1.0) for node in "ab"]
    assert points(hosts, {("a", "b"): 0.0, ("b", "a"): 0.0}, 4) == set()


def test_without_a_path_there_are_none() -> None:
    gap = [Hosted("a", 0, 3, layer_s=1.0), Hosted("b", 4, 6, layer_s=1.0)]
    unlinked = [Hosted("a", 0, 4, layer_s=1.0), Hosted("b", 3, 6, layer_s=1.0)]
    assert points(gap, {("a", "b"): 1.0}, 6) == set()
    assert points(unlinked, {}, 6) == set()
    assert points([], {}, 6) == set()


def fastest(hosts: Sequence[Hosted], rtt: RttMs, layers: int) -> float:
    """Every node at every layer."""
    holding = [[h for h in hosts if h.start <= layer < h.end] for layer in range(layers)]
    return min(
        (
            sum(host.layer_s for host in path)
            + sum(rtt[a.node, b.node] for a, b in pairwise(path) if a is not b)
            for path in product(*holding)
        ),
        default=math.inf,
    )


@settings(max_examples=100, deadline=None)
@given(st.data())
def test_what_is_given_up_costs_nothing(data: st.DataObject) -> None:
    layers = 5
    hosts = []
    for node in "abc":
        start = data.draw(st.integers(0, layers - 1))
        end = data.draw(st.integers(start + 1, layers))
        hosts.append(Hosted(node, start, end, layer_s=data.draw(st.integers(0, 9))))
    rtt: RttMs = {(a, b): data.draw(st.integers(0, 9)) for a in "abc" for b in "abc" if a != b}
    kept = {host.node: (host.start, host.end) for host in hosts}
    found = points(hosts, rtt, layers)
    for node, layer, kind in sorted(found):
        start, end = kept[node]
        assert start < layer < end
        kept[node] = (layer, end) if kind == "head" else (start, layer)
    trimmed = [Hosted(h.node, *kept[h.node], h.layer_s) for h in hosts]
    assert fastest(trimmed, rtt, layers) == fastest(hosts, rtt, layers)
    assert points(list(reversed(hosts)), rtt, layers) == found
