"""Moving the boundaries of a chain as little as exact sizes demand. Fast, but not exhaustive.

Boundaries are indices of cuts. Going back from the last stage gives the earliest place where every
stage may begin, going forward the farthest where it may end; between the two a target is kept.
"""

from collections.abc import Sequence

from pxd.planning.capacity import Budget, StageSizes
from pxd.planning.classic.chain import Ranges


def reaches_end(sizes: StageSizes, rooms: Sequence[Budget]) -> bool:
    """Whether stages in this order could hold the model if a stage might also hold nothing."""
    position = 0
    for room in rooms:
        position = sizes.reach(room, position)
    return position == len(sizes.cuts) - 1


def clamp(sizes: StageSizes, rooms: Sequence[Budget], targets: Sequence[int]) -> Ranges | None:
    """Layer ranges that end near `targets` (indices of cuts), at least one piece for each node.

    None if this does not come out, which may happen although a cut exists where some pieces are
    too large for some nodes.
    """
    goal, stages = len(sizes.cuts) - 1, len(rooms)
    begins = _earliest(sizes, rooms)
    if begins is None:
        return None
    ranges, start = [], 0
    for stage, room in enumerate(rooms):
        last = stage == stages - 1
        least = goal if last else max(start + 1, begins[stage + 1])
        most = min(sizes.reach(room, start), goal - (stages - 1 - stage))
        if least > most:
            return None
        end = min(max(targets[stage], least), most)
        ranges.append((sizes.cuts[start], sizes.cuts[end]))
        start = end
    return ranges


def _earliest(sizes: StageSizes, rooms: Sequence[Budget]) -> list[int] | None:
    """Where each stage may begin at the earliest so that it and those after it reach the end."""
    end = len(sizes.cuts) - 1
    begins = []
    for stage in range(len(rooms) - 1, -1, -1):
        low, high = stage, end
        while low < high:
            middle = (low + high) // 2
            if sizes.fits(rooms[stage], sizes.cuts[middle], sizes.cuts[end]):
                high = middle
            else:
                low = middle + 1
        if low >= end:
            return None
        begins.append(low)
        end = low
    return begins[::-1]
