"""The cheapest way through hosted layer ranges, from the first layer to the last.

A range may follow another that ends where it starts, so ranges sorted by their start form a
directed acyclic graph and one sweep over the layer boundaries finds all cheapest ways. The token's
way home depends on both ends of a chain, so ways are kept apart by the node that they start on.
"""

import math
from collections.abc import Callable, Iterable, Sequence, Set
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from pxd.planning.routing.cost import Hosted, RouteCost

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.intp]

_Between = Callable[[Hosted, Hosted], float]

_BLOCK = 1 << 16
"""Sums looked at in one go: what a processor's cache holds."""


class Path(NamedTuple):
    """Node ids in order, and the seconds that the cost function gives for them."""

    nodes: tuple[str, ...]
    latency: float


NO_PATH = Path((), math.inf)


class _Boundary(NamedTuple):
    """A layer at which some ranges end and others start; `hops` is (starting, ending).

    Heads are not among those that end: each has one row of a sweep for itself.
    """

    position: int
    ending: Ints
    starting: Ints
    hops: Floats


def useful_hosts(hosted: Iterable[Hosted], layers: int) -> list[Hosted]:
    """Those that are part of a chain over [0, layers), sorted by where they start, then by id.

    Raises ValueError for a model without layers, a range that is not one of the model's, and a
    node with two ranges.
    """
    if layers < 1:
        raise ValueError("a model needs one or more layers")
    ordered = sorted(hosted, key=lambda host: (host.start, host.node))
    for host in ordered:
        if not 0 <= host.start < host.end <= layers:
            raise ValueError(
                f"node {host.node!r} has layers [{host.start}, {host.end}), "
                f"which are no range of a model with {layers}"
            )
    if len({host.node for host in ordered}) != len(ordered):
        raise ValueError("a node hosts two ranges of the same model")
    reached = {0}
    for host in ordered:
        if host.start in reached:
            reached.add(host.end)
    onward = _onward(ordered, layers)
    return [host for host in ordered if host.start in reached and host.end in onward]


def _onward(ordered: Sequence[Hosted], layers: int) -> set[int]:
    """The layers from which these ranges, sorted by start, lead on to the last."""
    onward = {layers}
    for host in reversed(ordered):
        if host.end in onward:
            onward.add(host.start)
    return onward


class RouteGraph:
    """All costs between neighbouring ranges, worked out once.

    That takes time and memory for every pair of neighbours, and a search from all heads for every
    such pair and head: most when a third of N nodes each hold the same third of the layers, N³/27.
    """

    def __init__(self, hosted: Iterable[Hosted], layers: int, cost: RouteCost) -> None:
        """Raises ValueError as `useful_hosts` does."""
        self._hosts = useful_hosts(hosted, layers)
        self._layers = layers
        self._place = {host.node: place for place, host in enumerate(self._hosts)}
        self._stages = np.array([cost.stage(host) for host in self._hosts], float)
        first = [host for host in self._hosts if host.start == 0]
        last = [host for host in self._hosts if host.end == layers]
        self.heads = tuple(host.node for host in first)
        self._tails = self._places(last)
        # Heads sort before all others, so that a head's place is its row in both tables.
        self._home = _table(first, last, lambda head, tail: cost.home(tail, head))
        self._first_hops = np.full((len(first), len(self._hosts)), math.inf)
        self._boundaries = [
            self._boundary(position, cost)
            for position in sorted({host.start for host in self._hosts[len(first) :]})
        ]

    def cheapest(self, heads: Sequence[str], taken: Set[str] = frozenset()) -> list[Path]:
        """The best path from each of these heads past the nodes that are taken.

        `NO_PATH` for a head without one. Ties go to the tail, and for each node to the one before
        it, that starts first, then to the smaller id.
        """
        left = [host for host in self._hosts if host.node not in taken]
        onward = _onward(left, self._layers)
        if all(self._hosts[self._place[head]].end not in onward for head in heads):
            return [NO_PATH] * len(heads)
        stages = self._stages.copy()
        stages[[self._place[node] for node in taken if node in self._place]] = math.inf
        sources = np.array([self._place[head] for head in heads])
        reached, before = self._sweep(sources, stages, onward)
        totals = reached[:, self._tails] + self._home[sources]
        best = totals.argmin(axis=1)
        return [
            self._path(before[row], source, self._tails[tail], float(totals[row, tail]))
            for row, (source, tail) in enumerate(zip(sources, best, strict=True))
        ]

    def _sweep(self, sources: Ints, stages: Floats, onward: Set[int]) -> tuple[Floats, Ints]:
        """(source, node): the cost of getting through that node, and the node before it."""
        rows = len(sources)
        reached = stages[sources, None] + self._first_hops[sources] + stages
        reached[np.arange(rows), sources] = stages[sources]
        before = np.repeat(sources[:, None], len(self._hosts), axis=1)
        for position, ending, starting, hops in self._boundaries:
            if position not in onward or not len(ending):
                continue
            step = max(1, _BLOCK // hops.size)
            for some in (slice(at, at + step) for at in range(0, rows, step)):
                sums = reached[some, ending][:, None, :] + hops
                choice = sums.argmin(axis=2)
                least = np.take_along_axis(sums, choice[:, :, None], axis=2)[:, :, 0]
                through = least + stages[starting]
                better = through < reached[some, starting]
                reached[some, starting] = np.where(better, through, reached[some, starting])
                before[some, starting] = np.where(better, ending[choice], before[some, starting])
        return reached, before

    def _path(self, before: Ints, source: int, tail: int, latency: float) -> Path:
        if math.isinf(latency):
            return NO_PATH
        places = [tail]
        while places[-1] != source:
            places.append(before[places[-1]])
        return Path(tuple(self._hosts[place].node for place in reversed(places)), latency)

    def _boundary(self, position: int, cost: RouteCost) -> _Boundary:
        before = [host for host in self._hosts if host.end == position]
        after = [host for host in self._hosts if host.start == position]
        hops = _table(after, before, lambda receiver, sender: cost.hop(sender, receiver))
        ending, starting = self._places(before), self._places(after)
        heads = ending < len(self.heads)
        self._first_hops[np.ix_(ending[heads], starting)] = hops[:, heads].T
        return _Boundary(position, ending[~heads], starting, hops[:, ~heads])

    def _places(self, hosts: Iterable[Hosted]) -> Ints:
        return np.array([self._place[host.node] for host in hosts], np.intp)


def _table(rows: Sequence[Hosted], columns: Sequence[Hosted], seconds: _Between) -> Floats:
    table = [[seconds(row, column) for column in columns] for row in rows]
    return np.array(table, float).reshape(len(rows), len(columns))


def shortest_path(hosted: Iterable[Hosted], layers: int, cost: RouteCost) -> Path:
    """The cheapest chain over [0, layers); `NO_PATH` if there is none.

    Of chains that cost the same, the one with the smallest head. Raises ValueError as
    `useful_hosts` does.
    """
    graph = RouteGraph(hosted, layers, cost)
    return min(graph.cheapest(graph.heads), key=lambda path: path.latency, default=NO_PATH)
