"""The best division of few nodes into pipelines: every possible set of nodes is tried.

Nodes that are alike are counted, not told apart, so that many nodes of few kinds are few too. The
best plan for a set of nodes is that without one of them, or the best chain of some of them beside
the best plan for the rest (dynamic programming over multisets).
"""

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from pxd.planning.auto.cutting import Cut, best_cuts
from pxd.planning.auto.orders import few_orders, most_orders, orders
from pxd.planning.auto.problem import Problem

MAX_DIVISIONS = 60_000
"""Of a set into a part and a rest, over all sets."""
THRIFTY_ABOVE = 3
MAX_STAGES = 8
"""Longer chains are left to the search."""

Counts = tuple[int, ...]
Division = tuple[float, tuple[Counts, ...]]
"""The sum of values, and the chains."""


def groups(problem: Problem, nodes: Sequence[int]) -> list[list[int]]:
    """Nodes that may stand for each other; each by itself where links differ."""
    if not problem.links.uniform:
        return [[node] for node in nodes]
    found: dict[int, list[int]] = {}
    for node in nodes:
        found.setdefault(problem.kinds[node], []).append(node)
    return list(found.values())


def effort_of(problem: Problem, nodes: Sequence[int], *, thrifty: bool = False) -> float:
    """What `best_partitions` of these nodes takes, in stages times places to begin and end them.

    Infinite where there are too many ways to divide them.
    """
    whole = [len(bundle) for bundle in groups(problem, nodes)]
    if prod((count + 1) * (count + 2) // 2 for count in whole) > MAX_DIVISIONS:
        return float("inf")
    sets = _sets_of_size(whole)
    tries = sum(
        stages * _most_orders(problem, stages, thrifty=thrifty) * sets[stages]
        for stages in range(1, min(len(nodes), MAX_STAGES, problem.last) + 1)
    )
    return tries * len(problem.cuts) ** 2


def _sets_of_size(whole: Sequence[int]) -> list[int]:
    """How many multisets of each size there are."""
    counts = [1]
    for most in whole:
        grown = [0] * (len(counts) + most)
        for size, number in enumerate(counts):
            for more in range(most + 1):
                grown[size + more] += number
        counts = grown
    return counts


def _most_orders(problem: Problem, stages: int, *, thrifty: bool) -> int:
    if thrifty and stages > THRIFTY_ABOVE:
        return 2 if problem.links.uniform else 4
    return most_orders(problem, stages)


def best_partitions(
    problem: Problem, nodes: Sequence[int], *, thrifty: bool = False
) -> list[list[Cut]]:
    """The chains of some of `nodes` with the greatest sum of values; and where that is one chain
    alone, also the best two or more, if there are any. Each has its best chain first.

    With `thrifty` long chains are tried in their most likely orders only.
    """
    bundles = groups(problem, nodes)
    whole = tuple(len(bundle) for bundle in bundles)
    chains = _best_chains(problem, bundles, whole, thrifty=thrifty)
    values = {counts: cut.value for counts, cut in chains.items()}
    best: dict[Counts, Division] = {(0,) * len(whole): (0.0, ())}
    for counts in _subsets(whole):
        best[counts] = max(_candidates(counts, values, best), key=_rank)
    found = [best[whole]]
    if len(best[whole][1]) == 1:
        several = [each for each in _candidates(whole, values, best) if len(each[1]) > 1]
        found += [max(several, key=_rank)] if several else []
    return [_named(chains, parts, bundles) for _, parts in found]


def _rank(division: Division) -> tuple[float, int]:
    return division[0], -len(division[1])


def _subsets(whole: Counts) -> Iterator[Counts]:
    """All but the empty one, each after those that are part of it."""
    everything = product(*(range(count + 1) for count in whole))
    next(everything)
    return everything


def _candidates(
    counts: Counts, values: dict[Counts, float], best: dict[Counts, Division]
) -> Iterator[Division]:
    for place, count in enumerate(counts):
        if count:
            yield best[(*counts[:place], count - 1, *counts[place + 1 :])]
    for part in _subsets(counts):
        if part in values:
            rest = best[tuple(a - b for a, b in zip(counts, part, strict=True))]
            yield rest[0] + values[part], (*rest[1], part)


def _best_chains(
    problem: Problem, bundles: list[list[int]], whole: Counts, *, thrifty: bool
) -> dict[Counts, Cut]:
    """The best chain of exactly these nodes, wherever there is one."""
    found: dict[Counts, Cut] = {}
    sets = list(_subsets(whole))
    for stages in range(1, min(MAX_STAGES, problem.last) + 1):
        orders_of = few_orders if thrifty and stages > THRIFTY_ABOVE else orders
        some = [counts for counts in sets if sum(counts) == stages]
        choices = [orders_of(problem, _nodes(bundles, counts)) for counts in some]
        cuts = best_cuts(problem, choices, thorough=not thrifty)
        found |= {counts: cut for counts, cut in zip(some, cuts, strict=True) if cut is not None}
    return found


def _nodes(bundles: list[list[int]], counts: Counts) -> list[int]:
    return [node for bundle, count in zip(bundles, counts, strict=True) for node in bundle[:count]]


def _named(
    chains: dict[Counts, Cut], parts: tuple[Counts, ...], bundles: list[list[int]]
) -> list[Cut]:
    """Give every chain nodes of its own: the best chain takes those that come first."""
    supply: dict[int, Iterator[int]] = {}
    for bundle in bundles:
        supply |= dict.fromkeys(bundle, iter(bundle))
    cuts = sorted((chains[part] for part in parts), key=lambda cut: (-cut.value, cut.order))
    named = []
    for cut in cuts:
        order = tuple(next(supply[node]) for node in cut.order)
        named.append(Cut(order, cut.ends, cut.score))
    return named
