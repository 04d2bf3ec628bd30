"""In which orders a set of nodes is worth trying as a chain.

Only the ends of a chain carry more than layers, and only links tell its neighbours apart. So what
is tried is which kinds of node stand at the ends, and where links differ, short ways round.
"""

from collections.abc import Iterable
from itertools import pairwise, permutations
from math import factorial

from pxd.planning.auto.problem import Problem

Order = tuple[int, ...]

ALL_ENDS = 5
"""Up to so many nodes every pair of kinds is tried at the ends."""
ALL_ORDERS = 4
"""Up to so many nodes every order is tried where links differ."""


def orders(problem: Problem, nodes: Iterable[int]) -> list[Order]:
    """Distinct orders of `nodes`, at least one, the same for any order of the input."""
    chain = tuple(sorted(nodes))
    if len(chain) <= 1:
        return [chain]
    if not problem.links.uniform:
        return _short_ways(problem, chain)
    by_kind = {problem.kinds[node]: node for node in reversed(chain)}
    ends = list(by_kind.values())
    if len(chain) > ALL_ENDS:
        ends = sorted({ends[0], ends[-1], chain[0]})
    found: dict[Order, Order] = {}
    for first in ends:
        for last in chain[::-1] if len(chain) <= ALL_ENDS else (chain[-1], chain[1]):
            if last != first:
                order = _with_ends(chain, first, last)
                found.setdefault(tuple(problem.kinds[node] for node in order), order)
    return list(found.values())


def most_orders(problem: Problem, stages: int) -> int:
    """A bound on how many orders of so many nodes there are to try."""
    if not problem.links.uniform:
        return factorial(stages) if stages <= ALL_ORDERS else 4
    return max(1, stages * (stages - 1)) if stages <= ALL_ENDS else 6


def few_orders(problem: Problem, nodes: Iterable[int]) -> list[Order]:
    """The two or so of `orders` that are most likely to be best, at little cost."""
    chain = tuple(sorted(nodes))
    if len(chain) <= 2 or not problem.links.uniform:
        return orders(problem, chain) if len(chain) <= 2 else _at_ends(_ring(problem, chain))
    return [_with_ends(chain, chain[0], chain[1]), chain]


def _with_ends(chain: Order, first: int, last: int) -> Order:
    inner = tuple(node for node in chain if node not in (first, last))
    return (first, *inner, last)


def _short_ways(problem: Problem, chain: Order) -> list[Order]:
    if len(chain) <= ALL_ORDERS:
        return list(permutations(chain))
    return _at_ends(_ring(problem, chain))


def _at_ends(ring: Order) -> list[Order]:
    """The ring cut open beside its largest node, which bears an end of the model best."""
    place = ring.index(min(ring))
    first = (*ring[place:], *ring[:place])
    last = (*first[1:], first[0])
    return [first, first[::-1], last, last[::-1]]


def _ring(problem: Problem, chain: Order) -> Order:
    """A short way round: nearest neighbours from the first, then 2-opt until nothing improves."""
    left, ring = list(chain[1:]), [chain[0]]
    while left:
        nearest = min(left, key=lambda node: (_step(problem, ring[-1], node), node))
        left.remove(nearest)
        ring.append(nearest)
    improved = True
    while improved:
        improved = False
        for first in range(1, len(ring) - 1):
            for last in range(first + 1, len(ring)):
                other = [*ring[:first], *reversed(ring[first : last + 1]), *ring[last + 1 :]]
                if _length(problem, other) < _length(problem, ring) - 1e-12:
                    ring, improved = other, True
    return tuple(ring)


def _length(problem: Problem, ring: list[int]) -> float:
    return sum(_step(problem, a, b) for a, b in pairwise([*ring, ring[0]]))


def _step(problem: Problem, a: int, b: int) -> float:
    return problem.hops((a, b))[0]
