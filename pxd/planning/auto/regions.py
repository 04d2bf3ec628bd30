"""Groups of nodes that are near each other, at the scales that the links themselves suggest."""

from collections.abc import Sequence
from itertools import combinations, pairwise

from pxd.planning.auto.problem import Problem

MAX_SCALES = 3
MIN_GAP = 1.5
"""Round-trip times that differ by less than this factor are of one scale."""


def regions(problem: Problem, nodes: Sequence[int]) -> list[list[list[int]]]:
    """For each scale, finest first, the nodes in groups joined by links no longer than that."""
    if problem.links.uniform:
        return []
    rtts = sorted({_rtt(problem, a, b) for a, b in combinations(nodes, 2)})
    gaps = [(above / below, below) for below, above in pairwise(rtts) if above > below * MIN_GAP]
    scales = sorted(below for _, below in sorted(gaps, reverse=True)[:MAX_SCALES])
    return [_joined(problem, nodes, scale) for scale in scales]


def _rtt(problem: Problem, a: int, b: int) -> float:
    return problem.links.rtt(problem.nodes[a], problem.nodes[b])


def _joined(problem: Problem, nodes: Sequence[int], longest: float) -> list[list[int]]:
    groups: list[list[int]] = []
    left = list(nodes)
    while left:
        group, reached = [], [left.pop(0)]
        while reached:
            node = reached.pop()
            group.append(node)
            near = [other for other in left if _rtt(problem, node, other) <= longest]
            reached.extend(near)
            left = [other for other in left if other not in set(near)]
        groups.append(sorted(group))
    return groups
