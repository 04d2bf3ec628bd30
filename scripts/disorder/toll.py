"""What deaths of one kind came to, as text and for programs. Pure."""

from collections import Counter
from collections.abc import Sequence
from datetime import datetime

import msgspec

from scripts.disorder.pauses import Death, Pause, Told, pause
from scripts.disorder.report import Spread, spread
from scripts.disorder.tally import LONGEST, Story
from scripts.disorder.victims import WORDS, Kind

SLACK_S = 30.0
"""What a request must have had left when all was well again, to be answered in any case."""

LATE_S = 5.0
TIMELY = ("not_ready", "deadline_exceeded")


class Toll(msgspec.Struct, frozen=True, kw_only=True):
    """`requests` met a death; of those that were `cut` the very node died that they were given to.

    `resumed` paused as `pauses` tells, in seconds after the death was detectable, of which the
    parts are `noticed`, `placed` and `first`; `others` are the pauses of all others, and `calm` the
    longest of each request that met no death, which tells how busy the machine was. `detectable`
    are the seconds from the death until then. `longest` tells the longest pauses one by one, and
    `bad` what nobody wants.
    """

    kind: Kind
    kills: int
    requests: int
    outcomes: dict[str, int]
    resumed: int
    detectable: Spread
    pauses: Spread
    noticed: Spread
    placed: Spread
    first: Spread
    others: Spread
    calm: Spread
    longest: list[str]
    bad: list[str]

    @property
    def passed(self) -> bool:
        return not self.bad


def toll(
    kind: Kind, deaths: Sequence[Death], stories: Sequence[Story], told: Told, offset: float
) -> Toll:
    """`offset` makes seconds since the epoch of those of the stories."""
    met: list[tuple[Story, Death, Pause]] = []
    calm = []
    for story in stories:
        found = [(d, p) for d in deaths if (p := pause(story, d, told, offset)) is not None]
        if found:
            met.append((story, *max(found, key=lambda each: each[1].seconds)))
        else:
            calm.append(max((end - begin for begin, end in story.gaps), default=0.0))
    # Who asked the very node that died waits for that node.
    own = [each for each in met if each[0].node != each[1].node]
    resumed = [found for _, _, found in own if found.resumed]
    return Toll(
        kind=kind,
        kills=len(deaths),
        requests=len(met),
        outcomes=dict(Counter(story.outcome for story, _, _ in met)),
        resumed=len(resumed),
        detectable=spread([death.detectable - death.at for death in deaths]),
        pauses=spread([found.seconds for found in resumed]),
        noticed=spread([found.noticed for found in resumed]),
        placed=spread([found.placed for found in resumed]),
        first=spread([found.first for found in resumed]),
        others=spread([found.seconds for _, _, found in own if not found.resumed]),
        calm=spread(calm),
        longest=[_told(*each, offset) for each in _longest(own)],
        bad=[words for story, death, _ in met if (words := _bad(kind, story, death, offset))],
    )


def _longest(met: list[tuple[Story, Death, Pause]]) -> list[tuple[Story, Death, Pause]]:
    return sorted(met, key=lambda each: each[2].seconds, reverse=True)[:LONGEST]


def _told(story: Story, death: Death, found: Pause, offset: float) -> str:
    parts = f"{found.noticed:.2f} + {found.placed:.2f} + {found.first:.2f} s"
    return (
        f"{found.seconds:.2f} s ({parts if found.resumed else 'not resumed'}), {story.id} at "
        f"{story.node}, {death.node} died at {datetime.fromtimestamp(death.at):%H:%M:%S}, "
        f"sent {story.sent + offset - death.at:.1f} s after"
    )


def _bad(kind: Kind, story: Story, death: Death, offset: float) -> str:
    """What is wrong about how a request ended; empty if nothing is."""
    sent, ended = story.sent + offset, story.ended + offset
    deadline = sent + story.timeout
    where = f"{ended - death.at:.1f} s after the death, {story.node}, {story.timeout:g} s: "
    if story.outcome in ("wrong", "lost"):
        return f"{where}{story.outcome}: {story.why}"
    if ended > deadline + LATE_S:
        return f"{where}{story.outcome}, {ended - deadline:.1f} s too late"
    if story.outcome != "error":
        return ""
    if kind != "restart" or deadline > death.over + SLACK_S:
        return f"{where}{story.why} after {ended - sent:.1f} s"
    return "" if story.why.endswith(TIMELY) else f"{where}{story.why}"


def lines(tolls: Sequence[Toll]) -> list[str]:
    head = f"{'':<31}" + "".join(f"{word:>9}" for word in _COLUMNS)
    found = [head]
    for each in tolls:
        counts = [each.kills, each.requests, each.resumed]
        counts += [each.outcomes.get(outcome, 0) for outcome in ("cut", "error", "lost", "wrong")]
        pauses = each.pauses
        cells = [f"{count:>9}" for count in counts]
        cells += [f"{s:>8.2f}s" for s in (pauses.p50, pauses.p99, pauses.longest)]
        cells += [f"{s.longest:>8.2f}s" for s in (each.others, each.calm)]
        found.append(f"{WORDS[each.kind]:<31}" + "".join(cells))
    found += ["", "of the resumed, p50 and longest:"]
    for each in tolls:
        parts = (each.noticed, each.placed, each.first, each.detectable)
        cells = [f"{part.p50:>9.2f}{part.longest:>8.2f}s" for part in parts]
        found.append(f"{WORDS[each.kind]:<31}" + "".join(cells))
    found.insert(len(found) - len(tolls), f"{'':<31}" + "".join(f"{w:>18}" for w in _PARTS))
    for each in tolls:
        found += [f"{WORDS[each.kind]}: {words}" for words in (*each.longest, *each.bad)]
    return found


_COLUMNS = ("kills", "requests", "resumed", "cut", "error", "lost", "wrong",
            "p50", "p99", "longest", "others", "calm")  # fmt: skip
_PARTS = ("until noticed", "until placed", "until text", "not detectable")
