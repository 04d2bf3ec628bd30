"""The allocator of Parallax v0.1.2 that weighs concurrency against latency.

Of all numbers of pipelines k it takes the one with the largest k²/s, where s is the fewest stages
that build k pipelines; of equals the smallest k. Up to `EXACT_NODES` nodes s is exact, as far as
layers are equal and a pipeline's nodes stand in canonical order. Beyond, s is the best that
`pxd.planning.classic.fitting` and a search of `SEARCH_STEPS` states find.
"""

from collections.abc import Sequence
from fractions import Fraction
from itertools import accumulate

from pxd.planning.classic.canonical import Canonical, Capacity, Estimate
from pxd.planning.classic.fitting import fit
from pxd.planning.classic.greedy import greedy
from pxd.planning.classic.packing import Groups, Packing
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings

EXACT_NODES = 14
SEARCH_STEPS = 15_000
_STEPS_BEYOND_A_WALK = 500
"""Of one search, after the first walk through all nodes."""


def dynamic(
    model: ModelCost, offers: Sequence[NodeOffer], settings: PlanSettings
) -> tuple[Chain, ...]:
    """Node-disjoint pipelines with the largest k²/s that was found, never below that of `greedy`.

    The order of `offers` does not matter. Raises ValueError for two offers of one node.
    """
    estimates: tuple[Estimate, ...] = ("mean", "cautious")
    candidates: list[tuple[Chain, ...]] = []
    for estimate in estimates:
        inputs = Canonical(model, offers, settings, estimate)
        groups = best_groups(inputs.capacities, inputs.pieces)
        cut = [inputs.cut(members) for members in groups]
        candidates.append(tuple(chain for chain in cut if chain is not None))
        if None not in cut:
            break
    candidates.append(greedy(model, offers, settings))
    return max(candidates, key=balance)


def balance(pipelines: Sequence[Sequence[object]]) -> Fraction:
    """k²/s: pipelines times pipelines per stage; 0 without any."""
    stages = sum(len(pipeline) for pipeline in pipelines)
    return Fraction(len(pipelines) ** 2, stages) if stages else Fraction(0)


def best_groups(capacities: Sequence[Capacity], pieces: int) -> Groups:
    """Groups of nodes that each hold a model of `pieces`, with the largest k²/s."""
    if len(capacities) <= EXACT_NODES:
        return exact_groups(capacities, pieces)
    return bounded_groups(capacities, pieces)


def exact_groups(capacities: Sequence[Capacity], pieces: int) -> Groups:
    packing = Packing(capacities, pieces)
    best: Groups = []
    for pipelines in range(packing.most_pipelines, 0, -1):
        stages = packing.fewest_stages(pipelines)
        while stages <= len(capacities) and Fraction(pipelines**2, stages) >= balance(best):
            if (found := packing.first(pipelines, stages)) is not None:
                best = found
                break
            stages += 1
    return best


def bounded_groups(capacities: Sequence[Capacity], pieces: int) -> Groups:
    packing = Packing(capacities, pieces)
    fitted = (fit(capacities, pieces, pairs=pairs) for pairs in (False, True))
    best = max((_some(groups) for groups in fitted), key=balance)
    limit = len(capacities) + _STEPS_BEYOND_A_WALK
    for pipelines in range(packing.most_pipelines, 0, -1):
        stages = packing.fewest_stages(pipelines)
        most = _most_stages(pipelines, balance(best), len(capacities))
        while stages <= most and packing.steps < SEARCH_STEPS:
            if (found := packing.balanced(pipelines, stages, limit)) is not None:
                best = found
                break
            stages += max(1, (most - stages) // 3)
    return best


def _some(groups: Groups) -> Groups:
    """Those with the fewest stages, as many as are best."""
    by_stages = sorted(groups, key=len)
    stages = accumulate(len(members) for members in by_stages)
    values = [Fraction(count**2, total) for count, total in enumerate(stages, start=1)]
    return by_stages[: values.index(max(values)) + 1] if values else []


def _most_stages(pipelines: int, beaten: Fraction, nodes: int) -> int:
    """With more stages than this, `pipelines` are no better than what they have to beat."""
    if not beaten:
        return nodes
    most = pipelines**2 / beaten
    return min(nodes, int(most) if most.denominator > 1 else int(most) - 1)
