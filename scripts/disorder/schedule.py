"""Which faults befall which nodes, and when. Pure: the same arguments give the same schedule."""

import random
from collections.abc import Collection, Iterator, Sequence
from typing import Literal, get_args

import msgspec

Kind = Literal["kill", "executor", "freeze", "hang", "partition", "drain", "leave", "model", "disk"]
KINDS: tuple[Kind, ...] = get_args(Kind)

LAYERS = 8
CAPACITIES: dict[int, tuple[int, ...]] = {
    3: (8, 4, 4),
    4: (4, 4, 4, 4),
    5: (4, 4, 3, 3, 3),
    6: (3, 3, 3, 3, 3, 3),
}
"""The most layers that each of so many nodes holds: all together have room for two pipelines."""

FIRST_S = 4.0
GAP_S = (2.0, 8.0)
RETURN_S = 10.0
"""What a node gets to come back and load its layers before something befalls it again."""

STEP_S = 0.5


class Rule(msgspec.Struct, frozen=True):
    """`lasting` says how long such a fault stays, in seconds: at least, at most.

    `out`: its nodes hold no layers for the others meanwhile. `alone`: one of its kind at a time.
    """

    lasting: tuple[float, float]
    out: bool = True
    alone: bool = False


RULES: dict[Kind, Rule] = {
    "kill": Rule((1, 15)),
    "executor": Rule((0, 0)),
    "freeze": Rule((1, 15)),
    "hang": Rule((1, 12)),
    "partition": Rule((3, 20), alone=True),
    "drain": Rule((5, 20)),
    "leave": Rule((1, 10)),
    "model": Rule((10, 25), out=False, alone=True),
    "disk": Rule((15, 40), out=False),
}


class Fault(msgspec.Struct, frozen=True, kw_only=True):
    """From `at` on, `lasting` seconds, on the nodes at `places`; of a partition they are one side.

    A change of models has no place.
    """

    at: float
    lasting: float
    kind: Kind
    places: tuple[int, ...]

    @property
    def over(self) -> float:
        """When the nodes can be counted on again."""
        return self.at + self.lasting + RETURN_S


def schedule(
    seed: int, seconds: float, capacities: Sequence[int], layers: int, kinds: Collection[Kind]
) -> tuple[Fault, ...]:
    """Faults that begin and end within `seconds`, in the order in which they begin.

    No node suffers two at a time, and the nodes that nothing takes away have room for all `layers`.
    """
    rng = random.Random(f"pxd chaos {seed}")
    known: list[Fault] = []
    at = FIRST_S
    for kind in _endless(rng, sorted(kinds)):
        fault = _next(rng, kind, at, seconds, known, capacities, layers)
        if fault is None:
            return tuple(known)
        known.append(fault)
        at = round(fault.at + rng.uniform(*GAP_S), 1)
    return ()


def _endless(rng: random.Random, kinds: Sequence[Kind]) -> Iterator[Kind]:
    """Each kind comes once, in any order, before one comes again."""
    while kinds:
        yield from rng.sample(kinds, len(kinds))


def _next(
    rng: random.Random,
    kind: Kind,
    at: float,
    seconds: float,
    known: Sequence[Fault],
    capacities: Sequence[int],
    layers: int,
) -> Fault | None:
    """The fault as soon as there are nodes for it; None if it would not be over in time."""
    lasting = round(rng.uniform(*RULES[kind].lasting), 1)
    while at + lasting <= seconds:
        going_on = [fault for fault in known if fault.over > at]
        places = _places(rng, kind, going_on, capacities, layers)
        if places is not None:
            return Fault(at=at, lasting=lasting, kind=kind, places=places)
        at = round(at + STEP_S, 1)
    return None


def _places(
    rng: random.Random,
    kind: Kind,
    going_on: Sequence[Fault],
    capacities: Sequence[int],
    layers: int,
) -> tuple[int, ...] | None:
    """Nodes that nothing has befallen and that the others can do without; None without such."""
    rule = RULES[kind]
    if rule.alone and any(fault.kind == kind for fault in going_on):
        return None
    if kind == "model":
        return ()
    busy = {place for fault in going_on for place in fault.places}
    gone = {place for fault in going_on if RULES[fault.kind].out for place in fault.places}
    free = [place for place in range(len(capacities)) if place not in busy]
    most = len(capacities) // 2 if kind == "partition" else 1
    for count in rng.sample(range(1, most + 1), most):
        taken = rng.sample(free, min(count, len(free)))
        away = gone.union(taken) if rule.out else gone
        if taken and sum(c for place, c in enumerate(capacities) if place not in away) >= layers:
            return tuple(sorted(taken))
    return None
