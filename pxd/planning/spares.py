"""Nodes that no pipeline needs stand by, each for the stage where it helps most."""

from collections.abc import Mapping, Sequence

from pxd.planning.auto.cutting import Cut
from pxd.planning.auto.problem import Problem
from pxd.planning.result import Spare

Held = Mapping[str, tuple[int, int]]
"""The layers that a node has loaded."""


def stand_by(
    problem: Problem, cuts: Sequence[Cut], nodes: Sequence[str], held: Held
) -> tuple[Spare, ...]:
    """One entry for each of `nodes`.

    A spare that holds a stage's range already makes the loss of that stage's node a matter of a
    moment. Who holds one goes on doing so. Stages that nobody stands by for come first, then those
    of the pipeline with most tokens/s, and of these the one with most bytes, the longest in coming.
    """
    places = problem.place_of
    ordered = sorted(nodes, key=lambda node: (node not in held, places.get(node, -1), node))
    stages = [
        (-cut.value, problem.sizes.weights(*_layers(problem, start, end)), start, end)
        for cut in cuts
        for _, start, end in cut.stages
    ]
    standing = [0] * len(stages)
    spares = []
    for node in ordered:
        able = [
            index
            for index, (_, _, start, end) in enumerate(stages)
            if node in places and problem.fits[problem.kinds[places[node]], start, end]
        ]
        if not able:
            spares.append(Spare(node, 0, 0))
            continue
        has = held.get(node)
        chosen = min(
            able,
            key=lambda i: (
                _layers(problem, *stages[i][2:]) != has,
                standing[i],
                stages[i][0],
                -stages[i][1],
                stages[i][2],
            ),
        )
        standing[chosen] += 1
        spares.append(Spare(node, *_layers(problem, *stages[chosen][2:])))
    return tuple(spares)


def _layers(problem: Problem, start: int, end: int) -> tuple[int, int]:
    return int(problem.cuts[start]), int(problem.cuts[end])
