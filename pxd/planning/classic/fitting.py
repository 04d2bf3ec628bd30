"""Pipelines one at a time, each closed with as little waste as possible. Fast for any cluster."""

from collections.abc import Sequence

from pxd.planning.classic.canonical import Capacity
from pxd.planning.classic.packing import Groups


def fit(capacities: Sequence[Capacity], pieces: int, *, pairs: bool) -> Groups:
    """Groups of nodes (indices, in canonical order) that hold a model of `pieces` each.

    Largest nodes first, until one more closes the pipeline: then the smallest that does (best-fit
    decreasing), or with `pairs` the two that together waste less.
    """
    left = list(range(len(capacities)))
    groups: Groups = []
    while (members := _next_group(capacities, pieces, left, pairs=pairs)) is not None:
        groups.append(members)
        taken = set(members)
        left = [node for node in left if node not in taken]
    return groups


def _next_group(
    capacities: Sequence[Capacity], pieces: int, left: Sequence[int], *, pairs: bool
) -> list[int] | None:
    first = next((node for node in left if capacities[node].embedding > 0), None)
    if first is None:
        return None
    if capacities[first].both >= pieces:
        return [max(node for node in left if capacities[node].both >= pieces)]
    members, missing = [first], max(1, pieces - capacities[first].embedding)
    others = [node for node in left if node > first]
    for place, node in enumerate(others):
        closing = _closing(capacities, missing, others[place:], pairs=pairs)
        if closing is not None:
            return members + closing
        still_missing = max(1, missing - capacities[node].plain)
        if still_missing < missing:
            members.append(node)
            missing = still_missing
    return None


def _closing(
    capacities: Sequence[Capacity], missing: int, nodes: Sequence[int], *, pairs: bool
) -> list[int] | None:
    """The one node, or the two, that hold what is missing and the least beyond it."""
    best: list[int] | None = None
    waste = 0
    for node in reversed(nodes):
        if capacities[node].head >= missing:
            best, waste = [node], capacities[node].head - missing
            break
    if not pairs or (best is not None and waste == 0):
        return best
    large, small = 0, len(nodes) - 1
    while large < small:
        size = capacities[nodes[large]].plain
        over = size + capacities[nodes[small]].head - missing
        if over < 0:
            small -= 1
            continue
        if size < missing and (best is None or over < waste):
            best, waste = [nodes[large], nodes[small]], over
        large += 1
    return best
