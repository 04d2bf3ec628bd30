"""Whom to ask for which chunks next, while a model comes from several nodes at once.

A state machine without I/O and clock; times are passed in, in seconds. A source that fails rests
for a while, longer from time to time. One whose bytes are not what they should be is never asked
again.
"""

from collections import deque
from collections.abc import Callable, Iterable
from typing import NamedTuple

from pxd.models.chunks import Chunk
from pxd.wire import MAX_WEIGHTS_BYTES

ASK_BYTES = MAX_WEIGHTS_BYTES
"""The most that is asked for at once."""

ASKS_IN_FLIGHT = 4
"""Of one source."""

RESTS_S = (1.0, 2.0, 5.0, 10.0, 20.0)

Has = Callable[[Chunk], bool]


class Ask(NamedTuple):
    """Chunks of one file, to be asked of one source."""

    source: str
    chunks: tuple[Chunk, ...]


class _Source:
    def __init__(self, has: Has) -> None:
        self.has = has
        self.lacks: set[Chunk] = set()
        self.asks = 0
        self.failures = 0
        self.rests_until = float("-inf")
        # Until it says otherwise.
        self.busy = True

    def offers(self, chunk: Chunk) -> bool:
        return self.has(chunk) and chunk not in self.lacks


class Transfer:
    """`want` chunks, `offer` sources, do what `next` says, and tell what became of it."""

    def __init__(self) -> None:
        self._waiting: deque[Chunk] = deque()
        self._under_way = 0
        self._sources: dict[str, _Source] = {}
        self._banned: set[str] = set()

    def want(self, chunks: Iterable[Chunk]) -> None:
        self._waiting.extend(chunks)

    def offer(self, source: str, has: Has) -> None:
        """`source` can be asked for the chunks that it `has`; also when that has changed."""
        if source in self._banned:
            return
        known = self._sources.get(source)
        if known is None:
            self._sources[source] = _Source(has)
        else:
            known.has = has
            known.lacks.clear()

    def ban(self, source: str) -> None:
        self._banned.add(source)
        self._sources.pop(source, None)

    @property
    def sources(self) -> tuple[str, ...]:
        return tuple(self._sources)

    @property
    def banned(self) -> frozenset[str]:
        return frozenset(self._banned)

    @property
    def idle(self) -> bool:
        """Nothing waits and nothing is under way."""
        return not self._waiting and not self._under_way

    @property
    def asking(self) -> int:
        """How many asks are under way."""
        return self._under_way

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def next(self, now: float, *, sparingly: bool = False) -> Ask | None:
        """What to ask for now, if anything. A source that is busy is asked for one chunk at a time,
        so that others can use the way to it, too; `sparingly`, so are all."""
        usable = [
            (known.asks, name)
            for name, known in self._sources.items()
            if known.rests_until <= now
            and known.asks < (1 if sparingly or known.busy else ASKS_IN_FLIGHT)
        ]
        for _, name in sorted(usable):
            known = self._sources[name]
            chunks = self._take(known, 1 if sparingly or known.busy else ASK_BYTES)
            if chunks:
                known.asks += 1
                self._under_way += 1
                return Ask(name, chunks)
        return None

    def _take(self, source: _Source, limit: int) -> tuple[Chunk, ...]:
        """Chunks of one file of at most `limit` bytes, but one at least; in their order."""
        taken: list[Chunk] = []
        size = 0
        passed: list[Chunk] = []
        while self._waiting:
            chunk = self._waiting.popleft()
            if not source.offers(chunk):
                passed.append(chunk)
            elif taken and (chunk.file != taken[0].file or size + chunk.size > limit):
                passed.append(chunk)
                break
            else:
                taken.append(chunk)
                size += chunk.size
        self._waiting.extendleft(reversed(passed))
        return tuple(taken)

    def arrived(self, ask: Ask, *, busy: bool = False) -> None:
        """`busy` says that the source has others to serve."""
        if known := self._end(ask):
            known.failures, known.busy = 0, busy

    def spoiled(self, ask: Ask) -> None:
        """What came is not what should be."""
        self._again(ask)
        self.ban(ask.source)

    def failed(self, ask: Ask, now: float) -> None:
        """Nothing came."""
        self._again(ask)
        self.rest(ask.source, now)

    def lacked(self, ask: Ask) -> None:
        """The source says that it does not have that."""
        if known := self._again(ask):
            known.lacks.update(ask.chunks)

    def rest(self, source: str, now: float) -> None:
        known = self._sources.get(source)
        if known is not None and known.rests_until <= now:
            known.rests_until = now + RESTS_S[min(known.failures, len(RESTS_S) - 1)]
            known.failures += 1

    def _again(self, ask: Ask) -> _Source | None:
        self._waiting.extendleft(reversed(ask.chunks))
        return self._end(ask)

    def _end(self, ask: Ask) -> _Source | None:
        self._under_way -= 1
        known = self._sources.get(ask.source)
        if known is not None:
            known.asks -= 1
        return known

    def wake_at(self, now: float) -> float:
        """When `next` may have something to say even if nothing happens until then."""
        later = (known.rests_until for known in self._sources.values() if known.rests_until > now)
        return min(later, default=float("inf"))

    def orphan(self) -> Chunk | None:
        """A chunk that waits and that no source has; None as long as somebody might give all."""
        for chunk in self._waiting:
            if not any(known.offers(chunk) for known in self._sources.values()):
                return chunk
        return None


def agree(answers: dict[str, tuple[bytes, ...]]) -> tuple[tuple[bytes, ...], frozenset[str]]:
    """What most of the sources say, place by place, and those that say otherwise anywhere.

    `answers` are of equal length; where as many say one thing as the other, whoever comes first in
    `answers` is believed.
    """
    agreed = []
    odd: set[str] = set()
    for said in zip(*answers.values(), strict=True):
        # `max` takes the first of several.
        best = max(said, key=said.count)
        agreed.append(best)
        odd.update(name for name, one in zip(answers, said, strict=True) if one != best)
    return tuple(agreed), frozenset(odd)
