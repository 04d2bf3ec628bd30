"""Water-filling: layers in proportion to compute, capped by capacity.

After the layer allocator of Parallax v0.1.2 (`reference/planning.md`), with two differences: the
compute of a node is that of all its devices, and every node can be promised a minimum.
"""

import math
from collections.abc import Sequence

_BISECTIONS = 60
_ROUNDING = 1e-6


def water_levels(
    capacities: Sequence[int], compute: Sequence[float], layers: int, minimum: int = 0
) -> list[float] | None:
    """Fractional shares min(capacity, max(minimum, λ·compute)) that sum to `layers`.

    A node's minimum is never more than its capacity. None when the capacities do not sum to
    `layers`, or the minimums exceed it. Every compute figure must be positive.
    """
    floors = [min(minimum, capacity) for capacity in capacities]
    if sum(capacities) < layers or sum(floors) > layers:
        return None

    def levels(height: float) -> list[float]:
        return [
            min(float(capacity), max(float(floor), height * speed))
            for capacity, floor, speed in zip(capacities, floors, compute, strict=True)
        ]

    low = 0.0
    high = max((c / f for c, f in zip(capacities, compute, strict=True)), default=0.0)
    for _ in range(_BISECTIONS):
        middle = (low + high) / 2
        if sum(levels(middle)) >= layers:
            high = middle
        else:
            low = middle
    return levels(high)


def water_fill(
    capacities: Sequence[int], compute: Sequence[float], layers: int, minimum: int = 0
) -> list[int] | None:
    """Whole layers per node, summing to `layers`: levels rounded by largest remainder.

    Ties go to the node that comes first. None as for `water_levels`.
    """
    levels = water_levels(capacities, compute, layers, minimum)
    if levels is None:
        return None
    counts = [math.floor(level + _ROUNDING) for level in levels]
    by_remainder = sorted(range(len(counts)), key=lambda i: (counts[i] - levels[i], i))
    missing = layers - sum(counts)
    while missing > 0:
        for index in by_remainder:
            if missing > 0 and counts[index] < capacities[index]:
                counts[index] += 1
                missing -= 1
    return counts
