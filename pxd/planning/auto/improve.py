"""Local search: makes a division of many nodes into pipelines better, step by step.

A step gives a spare node to a pipeline, takes away one that does not help, exchanges a node for a
spare or for one of another pipeline, or divides the nodes of two pipelines anew. Steps are taken in
a fixed order while they raise the sum of values and effort is left, so the result and the time it
takes depend on the problem alone. The last two pipelines become one only where that gains so much
that the plan is preferred.
"""

from collections.abc import Callable, Iterator, Sequence
from itertools import pairwise

from pxd.planning.auto.cutting import Cut, best_cut
from pxd.planning.auto.orders import few_orders
from pxd.planning.auto.partition import best_partitions, effort_of
from pxd.planning.auto.problem import Problem
from pxd.planning.auto.redundancy import preferred

PAIR_EFFORT = 1_500_000
PAIR_SPARES = 2
SOLVE_EFFORT = 30_000
"""What asking costs, however small the answer."""
MIN_GAIN = 1 + 1e-6
NEIGHBOURS = 4
"""Spares or pipelines that a step looks at."""

Nodes = tuple[int, ...]


class Improver:
    """Searches among some nodes of the problem; what one search finds out, the next one knows."""

    def __init__(self, problem: Problem, nodes: Sequence[int]) -> None:
        self._problem = problem
        self._nodes = tuple(nodes)
        self._effort = 0
        self._cache: dict[Nodes, Cut | None] = {}
        self._pairs: set[Nodes] = set()

    @property
    def exhausted(self) -> bool:
        return self._effort <= 0

    def solve(self, nodes: Sequence[int]) -> Cut | None:
        """The best cut found for exactly these nodes."""
        nodes = tuple(sorted(nodes))
        key = nodes
        if self._problem.links.uniform:
            key = tuple(sorted(self._problem.kinds[node] for node in nodes))
        if key not in self._cache:
            orders = few_orders(self._problem, nodes) if nodes else []
            self._effort -= len(orders) * len(nodes) * len(self._problem.cuts) ** 2 + SOLVE_EFFORT
            self._cache[key] = best_cut(self._problem, orders)
        cut = self._cache[key]
        return cut if cut is None else self._renamed(cut, nodes)

    def _renamed(self, cut: Cut, nodes: Nodes) -> Cut:
        """A cut found for nodes of the same kinds, with these nodes."""
        if set(cut.order) == set(nodes):
            return cut
        kinds = self._problem.kinds
        left = list(nodes)
        order = []
        for other in cut.order:
            node = next(node for node in left if kinds[node] == kinds[other])
            left.remove(node)
            order.append(node)
        return Cut(tuple(order), cut.ends, cut.score)

    def improve(self, cuts: list[Cut], effort: int) -> list[Cut]:
        """`cuts`, or better ones; never worse. Takes about `effort`, counted as in `partition`."""
        self._effort = effort
        steps = (self._grow, self._trade, self._pair)
        tried = 0
        while tried < len(steps) and not self.exhausted:
            better = steps[tried](sorted(cuts, key=lambda cut: (cut.value, cut.order)))
            # What costs least is tried first, and again after every success.
            cuts, tried = (cuts, tried + 1) if better is None else (better, 0)
        return cuts

    def _grow(self, cuts: list[Cut]) -> list[Cut] | None:
        return self._each(cuts, lambda cut, near: ((*cut.order, spare) for spare in near))

    def _trade(self, cuts: list[Cut]) -> list[Cut] | None:
        return self._each(cuts, _traded)

    def _each(
        self, cuts: list[Cut], changes: Callable[[Cut, list[int]], Iterator[Nodes]]
    ) -> list[Cut] | None:
        """Every pipeline with the best of its changes, if any is better with one."""
        changed = False
        spares = self._spares(cuts)
        for place, cut in enumerate(cuts):
            near = self._nearest(cut.order, spares)
            better = self._best([cut], ([nodes] for nodes in changes(cut, near)))
            if better is not None:
                cuts[place] = better[0]
                changed = True
                spares = self._spares(cuts)
        return cuts if changed else None

    def _spares(self, cuts: list[Cut]) -> list[int]:
        """Nodes in no pipeline; one of each kind where nothing else tells them apart."""
        used = {node for cut in cuts for node in cut.order}
        spares = [node for node in self._nodes if node not in used]
        if not self._problem.links.uniform:
            return spares
        return sorted({self._problem.kinds[node]: node for node in reversed(spares)}.values())

    def _nearest(self, order: Nodes, nodes: list[int]) -> list[int]:
        if not self._problem.links.uniform:
            far = {node: sum(self._problem.hops((order[0], node))) for node in nodes}
            nodes = sorted(nodes, key=lambda node: (far[node], node))
        return nodes[:NEIGHBOURS]

    def _best(self, held: list[Cut], choices: Iterator[list[Nodes]]) -> list[Cut] | None:
        best = None
        value = sum(cut.value for cut in held) * MIN_GAIN
        for choice in choices:
            if self.exhausted:
                break
            found = [self.solve(nodes) for nodes in choice]
            cuts = [cut for cut in found if cut is not None]
            if len(cuts) == len(found) and sum(cut.value for cut in cuts) > value:
                best, value = cuts, sum(cut.value for cut in cuts)
        return best

    def _pair(self, cuts: list[Cut]) -> list[Cut] | None:
        spares = self._spares(cuts)
        for first, second in self._neighbours(cuts):
            near = self._nearest(first.order, spares)[:PAIR_SPARES]
            nodes = tuple(sorted((*first.order, *second.order, *near)))
            if nodes in self._pairs:
                continue
            self._pairs.add(nodes)
            better = self._divide(first, second, nodes, last=len(cuts) == 2)
            if better is not None:
                return [cut for cut in cuts if cut not in (first, second)] + better
            if self.exhausted:
                break
        return None

    def _neighbours(self, cuts: list[Cut]) -> Iterator[tuple[Cut, Cut]]:
        """Pairs alike in value, then the worst with the best."""
        yield from pairwise(cuts)
        yield from zip(cuts[: len(cuts) // 2], reversed(cuts), strict=False)

    def _divide(self, first: Cut, second: Cut, nodes: Nodes, *, last: bool) -> list[Cut] | None:
        if first.order == second.order:
            return None
        effort = effort_of(self._problem, nodes, thrifty=True)
        if effort <= PAIR_EFFORT:
            self._effort -= int(effort) + SOLVE_EFFORT
            divisions = best_partitions(self._problem, nodes, thrifty=True)
            cuts = preferred(divisions) if last else divisions[0]
            value = (first.value + second.value) * MIN_GAIN
            return cuts if sum(cut.value for cut in cuts) > value else None
        return self._best([first, second], _exchanges(first.order, second.order))


def _traded(cut: Cut, near: list[int]) -> Iterator[Nodes]:
    """Without one of the nodes, or with a spare for it."""
    for node in cut.order:
        rest = tuple(other for other in cut.order if other != node)
        yield from ((*rest, spare) for spare in near)
        if rest:
            yield rest


def _exchanges(first: Nodes, second: Nodes) -> Iterator[list[Nodes]]:
    for a in first:
        rest = tuple(node for node in first if node != a)
        if rest:
            yield [rest, (*second, a)]
        for b in second:
            yield [(*rest, b), (*(node for node in second if node != b), a)]
    for b in second:
        rest = tuple(node for node in second if node != b)
        if rest:
            yield [(*first, b), rest]
