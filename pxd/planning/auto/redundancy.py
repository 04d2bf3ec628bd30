"""Which of several plans is the best, where a second pipeline is worth some speed.

With one pipeline any death stops everything until other nodes have loaded what is lost. With two
the requests go on at once on the other one, and a third adds little to that.
"""

from collections.abc import Sequence
from math import fsum

from pxd.planning.auto.cutting import Cut

REDUNDANCY_SHARE = 0.15
"""Of the objective that is given up, at most, to have more than one pipeline."""


def value_of(cuts: Sequence[Cut]) -> float:
    return fsum(cut.value for cut in cuts)


def is_redundant(cuts: Sequence[Cut]) -> bool:
    return len(cuts) > 1


def is_near(cuts: Sequence[Cut], best: Sequence[Cut]) -> bool:
    """Whether `cuts` are worth as much as `best`, but for the share that redundancy may cost."""
    return value_of(cuts) >= value_of(best) * (1 - REDUNDANCY_SHARE)


def preferred(plans: Sequence[list[Cut]]) -> list[Cut]:
    """The plan with the greatest value, or the redundant one with the greatest, where that is near.

    Among equals the first wins. There must be at least one plan.
    """
    best = max(plans, key=value_of)
    several = max(filter(is_redundant, plans), key=value_of, default=best)
    return several if is_near(several, best) else best
