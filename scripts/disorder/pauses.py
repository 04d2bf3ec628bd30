"""What a death has cost one request, and what that was made of. Pure.

A request waits until the death is detectable, until its ingress takes notice, until another
pipeline has it, and until the next text comes. The first three are in the daemons' logs, which name
requests as clients know them.
"""

import re
from collections import defaultdict
from collections.abc import Iterable
from datetime import datetime

import msgspec

from scripts.disorder.tally import Story

_LINE = re.compile(r"(\d{4}-\d\d-\d\d \d\d:\d\d:\d\d\.\d{3}) \S+ +(\S+): (.*)")
_NOTICED = re.compile(r"request (\S+) goes on after a failure")
_PLACED = re.compile(r"request (\S+) is on pipeline")
_SUSPECTED = re.compile(r"\S+ \((\S+)\) does not answer")


class Told(msgspec.Struct):
    """What logs tell, in seconds since the epoch: of requests, and of nodes that were suspected."""

    noticed: dict[str, list[float]]
    placed: dict[str, list[float]]
    suspected: dict[str, list[float]]

    @classmethod
    def of(cls, logs: Iterable[str]) -> "Told":
        """`logs` are whole logs of daemons, in their local time."""
        told = cls(defaultdict(list), defaultdict(list), defaultdict(list))
        for log in logs:
            for line in log.splitlines():
                told._take(line)
        return told

    def _take(self, line: str) -> None:
        if not (found := _LINE.match(line)):
            return
        when, _, message = found.groups()
        for pattern, times in (
            (_NOTICED, self.noticed),
            (_PLACED, self.placed),
            (_SUSPECTED, self.suspected),
        ):
            if match := pattern.match(message):
                times[match[1]].append(datetime.fromisoformat(when).timestamp())


class Death(msgspec.Struct, frozen=True, kw_only=True):
    """`at` it happened, `detectable` it was from then on, and `over` once the node was started
    again. Seconds since the epoch."""

    node: str
    at: float
    detectable: float
    over: float


class Pause(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds after the death was detectable. The parts are 0 of a request that no failure befell:
    it waited for something else, such as its turn."""

    seconds: float
    noticed: float = 0.0
    placed: float = 0.0
    first: float = 0.0
    resumed: bool = False


def pause(story: Story, death: Death, told: Told, offset: float) -> Pause | None:
    """The longest one that a death has cost a request; None if they have not met.

    `offset` makes seconds since the epoch of those of the story.
    """
    sent, ended = story.sent + offset, story.ended + offset
    if ended < death.at or sent > death.over:
        return None
    gaps = [
        (max(begin + offset, death.detectable), end + offset)
        for begin, end in story.gaps
        if end + offset > death.detectable and begin + offset < death.over
    ]
    if not gaps:
        return Pause(seconds=0.0)
    begin, end = max(gaps, key=lambda gap: gap[1] - gap[0])
    name = story.id.removeprefix("chatcmpl-")
    noticed = [when for when in told.noticed.get(name, ()) if death.at <= when <= end]
    placed = [when for when in told.placed.get(name, ()) if death.at <= when <= end]
    if not noticed or not placed or placed[-1] < begin:
        return Pause(seconds=end - begin)
    return Pause(
        seconds=end - begin,
        noticed=max(noticed[0] - begin, 0.0),
        placed=placed[-1] - max(noticed[0], begin),
        first=end - placed[-1],
        resumed=True,
    )
