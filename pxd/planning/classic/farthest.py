"""Which nodes, in which order, get farthest through a model.

Layers of unequal size make this a packing problem, so it is solved by dynamic programming over the
multiset of nodes used (nodes with equal budgets are interchangeable): the state keeps only the
farthest cut reached, which is exact because a stage that starts later never ends earlier. The
number of states kept per chain length is bounded, so that many different nodes are searched by
beam; up to 12 nodes, or more where some are equal, are searched exactly.
"""

import functools
from collections.abc import Mapping

from pxd.planning.capacity import Budget, StageSizes

_EXTENSIONS = 250_000
_MIN_BEAM = 16

_Counts = tuple[int, ...]
"""How many nodes of each kind a chain uses."""
_Chain = tuple[int, tuple[int, ...]]
"""Index of the cut that a chain reaches, and the kinds of its nodes in order."""


def farthest_chain(sizes: StageSizes, rooms: Mapping[str, Budget]) -> tuple[int, list[str]]:
    """The farthest layer that a chain of these nodes can reach, and such a chain.

    Every node of the chain holds at least one layer. Deterministic for a given mapping, whatever
    its order. The model fits if the first figure is its number of layers.
    """
    kinds = sorted(set(rooms.values()), reverse=True)
    supply = [sorted(node for node in rooms if rooms[node] == kind) for kind in kinds]
    beam = max(_MIN_BEAM, _EXTENSIONS // max(1, len(rooms) * len(kinds)))
    goal = len(sizes.cuts) - 1
    reach = functools.cache(lambda kind, position: sizes.reach(kinds[kind], position))
    layer: dict[_Counts, _Chain] = {(0,) * len(kinds): (0, ())}
    farthest: _Chain = (0, ())
    while layer and farthest[0] < goal:
        grown: dict[_Counts, _Chain] = {}
        for used, (position, path) in layer.items():
            for kind in range(len(kinds)):
                if used[kind] == len(supply[kind]):
                    continue
                reached = reach(kind, position)
                if reached == position:
                    continue
                counts = (*used[:kind], used[kind] + 1, *used[kind + 1 :])
                if counts not in grown or reached > grown[counts][0]:
                    grown[counts] = (reached, (*path, kind))
        layer = _best(grown, kinds, beam)
        farthest = max([farthest, *layer.values()], key=lambda state: state[0])
    return sizes.cuts[farthest[0]], _name(farthest[1], supply)


def _best(states: dict[_Counts, _Chain], kinds: list[Budget], beam: int) -> dict[_Counts, _Chain]:
    """Those that got farthest; among equals, those that used up the least memory."""
    if len(states) <= beam:
        return states

    def rank(counts: _Counts) -> tuple[int, int, _Counts]:
        spent = sum(count * kind.weights for count, kind in zip(counts, kinds, strict=True))
        return -states[counts][0], spent, counts

    return {counts: states[counts] for counts in sorted(states, key=rank)[:beam]}


def _name(path: tuple[int, ...], supply: list[list[str]]) -> list[str]:
    queues = [iter(nodes) for nodes in supply]
    return [next(queues[kind]) for kind in path]
