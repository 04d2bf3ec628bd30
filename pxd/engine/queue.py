"""In which order waiting requests are admitted: urgent ones first, fairly among sources.

Of one source, the lowest `priority` goes first, and among equals clients take turns. Of the places
that become free,

- every second goes to a request of the lowest priority there is,
- the others to the source that has been given least, whatever it says of its urgency,
- and every `OLDEST_EVERY`-th to whoever waits longest.

So priority matters, but no source can shut out another with it, and neither priority nor a crowd of
sources or clients starves anybody. Taking turns is start-time fair queuing (Goyal, Vin, Cheng
1996): whose work so far is least goes first, and who was away is not owed anything.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from pxd.engine.requests import Sequence

OLDEST_EVERY = 8
_SLACK = 64

_Key = tuple[int, float, int, int]
"""Priority, tag of the client, order of arrival, number: the least is first."""


class QueueFull(Exception):
    """As many requests wait as may."""


class _Shares:
    """Start-time fair queuing: tags of work, on a clock that goes on as work is begun."""

    def __init__(self) -> None:
        self.reached = 0.0
        self._ends: dict[str, float] = {}

    def start(self, name: str) -> float:
        return max(self.reached, self._ends.get(name, 0.0))

    def charge(self, name: str, work: int) -> None:
        self._ends[name] = self.start(name) + work

    def begun(self, tag: float) -> None:
        self.reached = max(self.reached, tag)

    def tidy(self, wanted: int) -> None:
        """Keep what is kept of those who have gone within bounds."""
        if len(self._ends) > wanted + _SLACK:
            self._ends = {name: end for name, end in self._ends.items() if end > self.reached}


class _Line:
    """What waits of one source."""

    def __init__(self, source: str) -> None:
        self.source = source
        self.clients = _Shares()
        self.keys: dict[int, _Key] = {}
        self._heap: list[_Key] = []

    def put(self, key: _Key) -> None:
        self.keys[key[3]] = key
        heapq.heappush(self._heap, key)

    def first(self) -> _Key:
        while self.keys.get(self._heap[0][3]) != self._heap[0]:
            heapq.heappop(self._heap)
        return self._heap[0]

    def remove(self, number: int) -> None:
        del self.keys[number]
        if len(self._heap) > 2 * len(self.keys) + _SLACK:
            self._heap = sorted(self.keys.values())
        self.clients.tidy(len(self.keys))


class WaitingQueue:
    """At most `limit` requests, beside those that were admitted before."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._lines: dict[str, _Line] = {}
        self._returned = _Line("")
        self._sources = _Shares()
        self._taken = self._order = 0
        self._first: Sequence | None = None

    def __len__(self) -> int:
        return len(self._waiting)

    def __contains__(self, number: int) -> bool:
        return number in self._waiting

    def __iter__(self) -> Iterator[Sequence]:
        """In order of arrival."""
        return iter(self._waiting.values())

    def push(self, sequence: Sequence) -> None:
        """Raises `QueueFull`."""
        if len(self._waiting) >= self._limit:
            raise QueueFull(f"{self._limit} requests wait already")
        line = self._lines.get(sequence.source)
        if line is None:
            line = self._lines[sequence.source] = _Line(sequence.source)
        tag = line.clients.start(sequence.client)
        line.clients.charge(sequence.client, sequence.limit)
        self._order += 1
        line.put((sequence.priority, tag, self._order, sequence.number))
        self._waiting[sequence.number] = sequence
        self._first = None

    def put_back(self, sequence: Sequence) -> None:
        """Somebody who was admitted already goes before all of its priority."""
        self._order += 1
        self._returned.put((sequence.priority, -1.0, -self._order, sequence.number))
        self._waiting[sequence.number] = sequence
        self._waiting.move_to_end(sequence.number, last=False)
        self._first = None

    def first(self) -> Sequence | None:
        """Who is to be admitted next; the same until the queue changes."""
        if self._first is None and self._waiting:
            self._first = self._choose()
        return self._first

    def take(self, sequence: Sequence) -> None:
        """The one that `first` returned is admitted."""
        self._taken += 1
        line = self._lines.get(sequence.source)
        if line is not None and sequence.number in line.keys:
            line.clients.begun(line.keys[sequence.number][1])
            self._sources.begun(self._sources.start(line.source))
            self._sources.charge(line.source, sequence.limit)
        self.remove(sequence.number)

    def remove(self, number: int) -> Sequence | None:
        sequence = self._waiting.pop(number, None)
        if sequence is None:
            return None
        self._first = None
        if number in self._returned.keys:
            self._returned.remove(number)
            return sequence
        line = self._lines[sequence.source]
        line.remove(number)
        if not line.keys:
            del self._lines[sequence.source]
            self._sources.tidy(len(self._lines))
        return sequence

    def _choose(self) -> Sequence:
        turn = self._taken % OLDEST_EVERY
        if turn == OLDEST_EVERY - 1:
            return next(iter(self._waiting.values()))
        places = [(self._sources.start(line.source), line.first()) for line in self._lines.values()]
        if self._returned.keys:
            places.append((-1.0, self._returned.first()))
        if turn % 2:
            _, key = min(places, key=lambda place: (place[0], place[1][2]))
        else:
            _, key = min(places, key=lambda place: (place[1][0], place[0], place[1][2]))
        return self._waiting[key[3]]
