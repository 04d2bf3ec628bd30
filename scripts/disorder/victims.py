"""Who is killed, in which cluster, and how."""

import random
from collections.abc import Sequence
from typing import Literal, get_args

import msgspec

from scripts.disorder.cluster import Status

Kind = Literal["node", "executor", "leader", "head", "middle", "tail", "freeze", "restart"]
KINDS: tuple[Kind, ...] = get_args(Kind)

WORDS: dict[Kind, str] = {
    "node": "kill -9 of a node",
    "executor": "kill -9 of an executor",
    "leader": "kill -9 of the leader",
    "head": "kill -9 of a head",
    "middle": "kill -9 of a middle stage",
    "tail": "kill -9 of a tail",
    "freeze": "SIGSTOP of a node",
    "restart": "kill -9, and no other pipeline",
}


class Layout(msgspec.Struct, frozen=True):
    """A cluster for some kinds: the most layers that each node holds, of eight."""

    capacities: tuple[int, ...]
    kinds: tuple[Kind, ...]


LAYOUTS = (
    Layout((8, 4, 4), ("node", "executor", "leader", "head", "tail", "freeze")),
    Layout((3, 3, 3, 8), ("middle",)),
    Layout((3, 3, 3), ("restart",)),
)
"""A whole model and two halves; three stages and a whole model; three stages and nothing else."""


def victims(kind: Kind, status: Status) -> set[str]:
    """The ids of those that can be meant, as things are: without any one of them a pipeline is
    left, unless that is the point."""
    lines: list[list[str]] = [
        [stage["node"] for stage in line]
        for model in status["models"]
        for line in model["pipelines"]
        if all(stage["state"] == "ready" for stage in line)
    ]
    found = _of_kind(kind, status["leader"], lines)
    if kind == "restart":
        return found
    return {node for node in found if any(node not in line for line in lines)}


def _of_kind(kind: Kind, leader: str | None, lines: Sequence[Sequence[str]]) -> set[str]:
    chains = [line for line in lines if len(line) > 1]
    match kind:
        case "leader":
            return {leader} if leader else set()
        case "head":
            return {line[0] for line in chains}
        case "middle":
            return {node for line in chains for node in line[1:-1]}
        case "tail":
            return {line[-1] for line in chains}
        case _:
            return {node for line in lines for node in line}


def choose(rng: random.Random, kind: Kind, status: Status) -> str | None:
    """The id of one of them; None if there is nobody of that kind."""
    found = sorted(victims(kind, status))
    return rng.choice(found) if found else None
