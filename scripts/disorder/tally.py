"""What became of the requests, and how long their readers waited. Pure."""

from collections import Counter
from typing import Literal

import msgspec

Outcome = Literal["finished", "error", "cut", "wrong", "lost"]
"""`error` is a proper one; of a request that was `cut`, the very node that it was given to went."""

RESUMED_S = 1.0
"""A pause that is longer is taken for a failure that was overcome."""

GAP_S = 0.1

LONGEST = 5
"""So many of the longest pauses are told one by one."""


class Ending(msgspec.Struct, frozen=True, kw_only=True):
    """How a request ended. `at`: seconds since the run began.

    `why` is the kind of an error, or says what was wrong.
    """

    at: float
    client: int
    node: str
    question: str
    outcome: Outcome
    why: str = ""


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """A long one: it was over `at` seconds after the run began."""

    seconds: float
    at: float
    client: int
    node: str


class Waits(msgspec.Struct, kw_only=True):
    """Seconds of one request: until the first text, and from each piece of text to the next."""

    first: float | None = None
    pauses: list[float] = []
    longest_at: float = 0.0
    """When the longest of all pauses was over, on trio's clock."""

    frozen: bool = False
    """Its own node was, some of the time: then its waits say nothing of the cluster."""

    def pause(self, seconds: float, now: float) -> None:
        if seconds >= self.longest:
            self.longest_at = now
        self.pauses.append(seconds)

    @property
    def longest(self) -> float:
        return max(self.pauses, default=0.0)


class Story(msgspec.Struct, frozen=True, kw_only=True):
    """One request as its client saw it. Times are on trio's clock.

    `gaps` are the times without text that were longer than `GAP_S`, from the beginning on. `id` is
    the daemon's name of the request, empty where there was no answer; `timeout` in seconds.
    """

    id: str
    node: str
    sent: float
    ended: float
    timeout: float
    gaps: list[tuple[float, float]]
    outcome: Outcome
    why: str


class Tally(msgspec.Struct, kw_only=True):
    """The sums of a run. `notable` are the endings that nobody wants, one by one."""

    sent: int = 0
    outcomes: Counter[Outcome] = msgspec.field(default_factory=Counter)
    errors: Counter[str] = msgspec.field(default_factory=Counter)
    cuts: Counter[str] = msgspec.field(default_factory=Counter)
    resumed: int = 0
    elsewhere: int = 0
    notable: list[Ending] = []
    pauses: list[float] = []
    firsts: list[float] = []
    longest: list[Pause] = []
    longest_frozen: float = 0.0

    def add(self, ending: Ending, waits: Waits, began: float) -> None:
        """`began`: when the run did, on trio's clock."""
        self.outcomes[ending.outcome] += 1
        if ending.outcome == "error":
            self.errors[ending.why] += 1
        elif ending.outcome == "cut":
            self.cuts[ending.why] += 1
        if ending.outcome not in ("finished", "cut"):
            self.notable.append(ending)
        if waits.frozen:
            self.longest_frozen = max(self.longest_frozen, waits.longest)
            return
        self.pauses += waits.pauses
        self.resumed += ending.outcome == "finished" and waits.longest > RESUMED_S
        if waits.first is not None:
            self.firsts.append(waits.first)
        pause = Pause(
            seconds=round(waits.longest, 3),
            at=round(waits.longest_at - began, 1),
            client=ending.client,
            node=ending.node,
        )
        longest = sorted([*self.longest, pause], key=lambda each: each.seconds, reverse=True)
        self.longest = longest[:LONGEST]

    def of(self, outcome: Outcome) -> list[Ending]:
        return [ending for ending in self.notable if ending.outcome == outcome]


def quantile(values: list[float], share: float) -> float:
    """The smallest value that at least that share of all does not exceed; 0 of none."""
    ordered = sorted(values)
    return ordered[min(int(share * len(ordered)), len(ordered) - 1)] if ordered else 0.0
