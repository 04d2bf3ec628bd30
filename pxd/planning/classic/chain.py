"""Cutting a model for a fixed order of nodes, exactly."""

from collections.abc import Sequence

from pxd.planning.capacity import Budget, StageSizes, layer_capacity
from pxd.planning.classic.waterfill import water_fill

Ranges = list[tuple[int, int]]


def cut_chain(
    sizes: StageSizes, rooms: Sequence[Budget], compute: Sequence[float]
) -> Ranges | None:
    """Layer ranges for nodes in this order: all of [0, L), at least one layer each.

    As near to proportional to compute as byte sizes and allowed cuts permit. None only if no cut
    of the model fits this order.
    """
    targets = _targets(sizes, rooms, compute)
    ranges, start = [], 0
    for count in targets:
        ranges.append((start, start + count))
        start += count
    if start == sizes.model.layers and _valid(sizes, rooms, ranges):
        return ranges
    return _nearest(sizes, rooms, targets)


def _valid(sizes: StageSizes, rooms: Sequence[Budget], ranges: Ranges) -> bool:
    cuts = set(sizes.cuts)
    return all(
        start < end and end in cuts and sizes.fits(room, start, end)
        for room, (start, end) in zip(rooms, ranges, strict=True)
    )


def _targets(sizes: StageSizes, rooms: Sequence[Budget], compute: Sequence[float]) -> list[int]:
    """Water-filled layer counts, exact when all layers are equal and may be cut anywhere."""
    last = len(rooms) - 1
    capacities = [
        _mean_capacity(sizes, room, embedding=index == 0, head=index == last)
        for index, room in enumerate(rooms)
    ]
    counts = water_fill(capacities, compute, sizes.model.layers, minimum=1)
    # Unequal layers can make the estimate fall short although an exact cut exists.
    return counts if counts is not None else capacities


def _mean_capacity(sizes: StageSizes, room: Budget, *, embedding: bool, head: bool) -> int:
    layers = sizes.model.layers
    memory = layer_capacity(room.weights, sizes.model, embedding=embedding, head=head)
    kv_bytes = sizes.kv_per_token(0, layers) * sizes.min_kv_tokens
    kv = room.kv * layers // kv_bytes if kv_bytes else layers
    return max(1, min(memory, kv, room.layers))


def _nearest(sizes: StageSizes, rooms: Sequence[Budget], targets: Sequence[int]) -> Ranges | None:
    """The fitting cut with the smallest squared distance from `targets`: dynamic programming.

    State: (stages placed, cut reached). At most len(rooms) * len(cuts)^2 steps.
    """
    cuts, goal = sizes.cuts, len(sizes.cuts) - 1
    best: dict[int, int] = {0: 0}
    back: list[dict[int, int]] = []
    for index, room in enumerate(rooms):
        still_to_come = len(rooms) - index - 1
        reached: dict[int, int] = {}
        came_from: dict[int, int] = {}
        for position, cost in best.items():
            for end in range(position + 1, goal - still_to_come + 1):
                if not sizes.fits(room, cuts[position], cuts[end]):
                    break
                distance = cost + (cuts[end] - cuts[position] - targets[index]) ** 2
                if end not in reached or distance < reached[end]:
                    reached[end], came_from[end] = distance, position
        best = reached
        back.append(came_from)
    if goal not in best:
        return None
    ranges, end = [], goal
    for came_from in reversed(back):
        start = came_from[end]
        ranges.append((cuts[start], cuts[end]))
        end = start
    return ranges[::-1]
