"""The best plan by trying everything: all divisions, all orders, all cuts.

The objective is written down once more from its definition, on the rooflines of `Problem`.
"""

from collections.abc import Iterator
from functools import cache
from itertools import combinations, permutations, product

import numpy as np

from pxd.planning.auto.problem import Problem

Kinds = tuple[int, ...]


def best_objectives(problem: Problem) -> tuple[float, float]:
    """Of any number of pipelines, and of two or more; 0 where there is no such plan.

    For nodes that differ by nothing but their kind.
    """
    assert problem.links.uniform
    chain_value = cache(lambda kinds: _best_chain(problem, kinds))

    @cache
    def best(kinds: Kinds) -> tuple[float, float]:
        if not kinds:
            return 0.0, 0.0
        found, several = best(kinds[1:])
        for part, rest in _with_first(kinds):
            value, beside = chain_value(part), best(rest)[0]
            found = max(found, value + beside)
            if value and beside:
                several = max(several, value + beside)
        return found, several

    return best(tuple(sorted(problem.kinds)))


def _with_first(kinds: Kinds) -> Iterator[tuple[Kinds, Kinds]]:
    """All ways to take the first node and some of the others, and what is left."""
    seen = set()
    for size in range(len(kinds)):
        for others in combinations(range(1, len(kinds)), size):
            part = tuple(kinds[place] for place in (0, *others))
            rest = tuple(kinds[p] for p in range(1, len(kinds)) if p not in others)
            if part not in seen:
                seen.add(part)
                yield part, rest


def _best_chain(problem: Problem, kinds: Kinds) -> float:
    inner = range(1, problem.last)
    cuts = np.array([(0, *some, problem.last) for some in combinations(inner, len(kinds) - 1)])
    if len(cuts) == 0:
        return 0.0
    return max(_best_of(problem, order, cuts) for order in set(permutations(kinds)))


def _best_of(problem: Problem, order: Kinds, cuts: np.ndarray) -> float:
    stages = len(order)
    hidden = problem.model.hidden_size * problem.model.activation_bytes
    onward = problem.links.transfer("one node", "another", hidden)
    home = problem.links.transfer("another", "one node", 0)
    hops = (stages - 1) * onward + home if stages > 1 else 0.0
    rows = range(stages)
    fits = np.all([problem.fits[order[i], cuts[:, i], cuts[:, i + 1]] for i in rows], axis=0)
    requests = problem.request_bytes[cuts[:, 1:]] - problem.request_bytes[cuts[:, :-1]]
    room = np.floor(problem.kv_rooms[list(order)] / np.maximum(requests, 1e-9)).min(axis=1)
    room = np.clip(room, 1, problem.workload.max_requests)

    @cache
    def seconds(batch: int) -> np.ndarray:
        (sums, beside), nodes = problem.decode(batch), np.array(order)[:, None]
        return sums[nodes, cuts[:, 1:].T] - sums[nodes, cuts[:, :-1].T] + beside[nodes]

    token = seconds(1).sum(axis=0) + hops
    best = np.zeros(len(cuts))
    for waves, batch in product(range(1, stages + 1), (1, 2, 4, 8, 16, 32)):
        if waves < stages and batch > 1:
            continue
        step = seconds(batch)
        speed = waves * batch / np.maximum(waves * step.max(axis=0), step.sum(axis=0) + hops)
        best = np.maximum(best, np.where(waves * batch <= room, speed, 0.0))
    value = best * np.minimum(1.0, problem.workload.token_limit_s / token) ** 2
    return float(np.where(fits, value, 0.0).max())
