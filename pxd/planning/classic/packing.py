"""Groups of nodes that each hold a whole model: k of them on as few nodes as possible.

The dynamic programme of Parallax v0.1.2 (`reference/planning.md`): nodes in canonical order, each
skipped, given to an open pipeline or starting one; the state is (node, residuals of the open
pipelines, pipelines to start). It is walked depth first for a given number of stages, states that
have failed are remembered, and those that the largest nodes left cannot complete are cut off.
"""

from bisect import bisect_left, insort
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

from pxd.planning.classic.canonical import Capacity

Groups = list[list[int]]
"""Indices of nodes, each group in canonical order: the first has the embedding, the last the head.
"""


class _State(NamedTuple):
    node: int
    residuals: tuple[int, ...]
    """Pieces that each open pipeline still needs, ascending, never 0."""
    unstarted: int
    stages: int
    """How many more nodes may be used."""

    @property
    def done(self) -> bool:
        return not self.residuals and not self.unstarted


class _Step(NamedTuple):
    residual: int | None
    """Of the open pipeline that the node was given to: all pieces for a new one, None: skipped."""
    state: _State


class Packing:
    """Builds pipelines from nodes in canonical order. `steps` counts the states looked at."""

    def __init__(self, capacities: Sequence[Capacity], pieces: int) -> None:
        self._nodes, self._pieces = capacities, pieces
        useful = [min(node.plain, pieces) for node in capacities]
        self._largest = list(accumulate(useful, initial=0))
        embedding = _least_loss(useful, [node.embedding for node in capacities])
        both = _least_loss(useful, [node.both for node in capacities])
        self._head = _least_loss(useful, [node.head for node in capacities])
        self._ends = min(embedding + self._head, both)
        self.steps = 0

    @property
    def most_pipelines(self) -> int:
        return min(len(self._nodes), self._largest[-1] // (self._pieces + self._ends))

    def fewest_stages(self, pipelines: int) -> int:
        """Fewer nodes than this are not enough; more than there are if all are not."""
        needed = pipelines * (self._pieces + self._ends)
        return max(pipelines, bisect_left(self._largest, needed))

    def first(self, pipelines: int, stages: int) -> Groups | None:
        """Groups on at most `stages` nodes, the first of them in the order of the tie rules.

        That is: rather skip a node, then give it to the open pipeline that needs least, then start
        one. Exhaustive, so None means that there are none.
        """
        return self._build(_State(0, (), pipelines, stages), balanced=False, limit=None)

    def balanced(self, pipelines: int, stages: int, limit: int) -> Groups | None:
        """Groups on at most `stages` nodes, if found within `limit` states.

        Every node goes first to the pipeline that needs most, so that all close at the same time.
        """
        return self._build(_State(0, (), pipelines, stages), balanced=True, limit=limit)

    def _build(self, root: _State, *, balanced: bool, limit: int | None) -> Groups | None:
        failed: dict[tuple[int, tuple[int, ...], int], int] = {}
        walk = [(root, self._successors(root, balanced=balanced))]
        taken: list[_Step] = []
        stop = None if limit is None else self.steps + limit
        while walk and (stop is None or self.steps < stop):
            state, successors = walk[-1]
            step = next(successors, None)
            if step is None:
                failed[state[:3]] = max(state.stages, failed.get(state[:3], 0))
                walk.pop()
                del taken[-1:]
                continue
            self.steps += 1
            if step.state.done:
                return self._groups([*taken, step])
            if (
                not self._hopeless(step.state)
                and failed.get(step.state[:3], -1) < step.state.stages
            ):
                taken.append(step)
                walk.append((step.state, self._successors(step.state, balanced=balanced)))
        return None

    def _hopeless(self, state: _State) -> bool:
        """Whether even the largest nodes left are too small, or too few."""
        node, residuals, unstarted, stages = state
        if stages < len(residuals) + unstarted:
            return True
        needed = sum(residuals) + len(residuals) * self._head
        needed += unstarted * (self._pieces + self._ends)
        last = min(len(self._nodes), node + stages)
        return self._largest[last] - self._largest[node] < needed

    def _successors(self, state: _State, *, balanced: bool) -> Iterator[_Step]:
        skipped = _Step(None, state._replace(node=state.node + 1))
        if balanced:
            yield from self._started(state)
            yield from self._given(state, reversed(range(len(state.residuals))))
            yield skipped
        else:
            yield skipped
            yield from self._given(state, range(len(state.residuals)))
            yield from self._started(state)

    def _started(self, state: _State) -> Iterator[_Step]:
        node, residuals, unstarted, stages = state
        if not unstarted:
            return
        left = self._after(node, None)
        if left < self._pieces:
            opened = _with(residuals, left)
            yield _Step(self._pieces, _State(node + 1, opened, unstarted - 1, stages - 1))

    def _given(self, state: _State, places: Iterator[int] | range) -> Iterator[_Step]:
        node, residuals, unstarted, stages = state
        before = 0
        for place in places:
            residual = residuals[place]
            if residual == before:
                continue
            before = residual
            left = self._after(node, residual)
            if left < residual:
                others = residuals[:place] + residuals[place + 1 :]
                yield _Step(residual, _State(node + 1, _with(others, left), unstarted, stages - 1))

    def _after(self, node: int, residual: int | None) -> int:
        """What a pipeline still needs once it has the node; the head always needs a piece more."""
        size = self._nodes[node]
        if residual is None:
            return 0 if size.both >= self._pieces else max(1, self._pieces - size.embedding)
        return 0 if size.head >= residual else max(1, residual - size.plain)

    def _groups(self, taken: Sequence[_Step]) -> Groups:
        """The walk once more, with names: of equal residuals the first is given the node."""
        closed: Groups = []
        pipelines: list[tuple[int, list[int]]] = []
        for node, (residual, _) in enumerate(taken):
            if residual is None:
                continue
            place = next((i for i, (needs, _) in enumerate(pipelines) if needs == residual), None)
            members = [] if place is None else pipelines.pop(place)[1]
            left = self._after(node, None if place is None else residual)
            members.append(node)
            if left:
                insort(pipelines, (left, members), key=lambda pipeline: pipeline[0])
            else:
                closed.append(members)
        return closed


def _least_loss(useful: Sequence[int], beside: Sequence[int]) -> int:
    """How many useful pieces an end costs at least, whichever node has it."""
    return min((max(0, most - rest) for most, rest in zip(useful, beside, strict=True)), default=0)


def _with(residuals: tuple[int, ...], residual: int) -> tuple[int, ...]:
    if not residual:
        return residuals
    place = bisect_left(residuals, residual)
    return (*residuals[:place], residual, *residuals[place:])
