"""Where the best path through overlapping ranges leaves a node early or enters it late.

After the warm-up of Parallax v0.1.2 (`reference/planning.md`): what a node holds beyond its turning
points is never used on that path and can be given up.
"""

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Literal, NamedTuple

from pxd.planning.routing.cost import Hosted

TurningPoint = tuple[str, int, Literal["head", "tail"]]
"""("a", 4, "tail"): node a can give up its layers from 4 on; "head": those before 4."""


class _Way(NamedTuple):
    """A way to a layer: of two the one with fewer seconds is better, then with fewer changes."""

    seconds: float
    changes: int
    came_from: str


def turning_points(
    hosted: Iterable[Hosted], rtt: Callable[[str, str], float], layers: int
) -> set[TurningPoint]:
    """The turning points on the fastest path that runs every layer on a node that holds it.

    A path costs each layer's seconds on its node, measured ones where there are any, and `rtt`
    (seconds, infinite where there is no link) at every change of node. Without such a path there
    are no turning points. A node that the path comes back to keeps all from its first to its last
    layer. Takes time with layers times the square of the nodes that hold one.
    """
    hosts = {host.node: host for host in sorted(hosted, key=lambda host: host.node)}
    path = _fastest_path(hosts, rtt, layers)
    first = {node: layer for layer, node in reversed(list(enumerate(path)))}
    last = {node: layer for layer, node in enumerate(path)}
    points: set[TurningPoint] = set()
    for node, layer in first.items():
        if layer > hosts[node].start:
            points.add((node, layer, "head"))
    for node, layer in last.items():
        if layer + 1 < hosts[node].end:
            points.add((node, layer + 1, "tail"))
    return points


def _fastest_path(
    hosts: Mapping[str, Hosted], rtt: Callable[[str, str], float], layers: int
) -> list[str]:
    """The node for every layer; empty if there is no path."""
    steps: list[dict[str, _Way]] = []
    for layer in range(layers):
        ways: dict[str, _Way] = {}
        for node, host in hosts.items():
            if host.start <= layer < host.end:
                arrivals = _arrivals(steps[-1], node, rtt) if steps else [_Way(0.0, 0, node)]
                seconds, changes, other = min(arrivals, default=_Way(math.inf, 0, node))
                if seconds < math.inf:
                    ways[node] = _Way(seconds + (host.measured_s or host.layer_s), changes, other)
        steps.append(ways)
    path: list[str] = []
    node = min(steps[-1], key=lambda name: steps[-1][name][:2], default="") if steps else ""
    for ways in reversed(steps):
        if node not in ways:
            return []
        path.append(node)
        node = ways[node].came_from
    return path[::-1]


def _arrivals(ways: Mapping[str, _Way], node: str, rtt: Callable[[str, str], float]) -> list[_Way]:
    return [
        way._replace(came_from=node)
        if other == node
        else _Way(way.seconds + rtt(other, node), way.changes + 1, other)
        for other, way in ways.items()
    ]
