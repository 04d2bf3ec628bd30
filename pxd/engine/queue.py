"""In which order waiting requests are admitted: by priority, fairly among sources, nobody for ever.

Among equals in priority, sources take turns by start-time fair queuing (Goyal, Vin, Cheng 1996): a
request is tagged with the work that its source has queued before it. Every `OLDEST_EVERY`-th place
goes to whoever waits longest, so that neither priority nor a crowd of sources starves anybody.
"""

import heapq
from collections import OrderedDict
from collections.abc import Iterator

from pxd.engine.requests import Sequence

OLDEST_EVERY = 8
_SLACK = 64


class QueueFull(Exception):
    """As many requests wait as may."""


class WaitingQueue:
    """At most `limit` requests."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._waiting: OrderedDict[int, Sequence] = OrderedDict()
        self._heap: list[tuple[int, float, int, int]] = []
        self._keys: dict[int, tuple[int, float, int, int]] = {}
        self._tags: dict[str, float] = {}
        self._reached = 0.0
        self._taken = self._order = 0

    def __len__(self) -> int:
        return len(self._waiting)

    def __iter__(self) -> Iterator[Sequence]:
        """In order of arrival."""
        return iter(self._waiting.values())

    def push(self, sequence: Sequence) -> None:
        """Raises `QueueFull`."""
        if len(self._waiting) >= self._limit:
            raise QueueFull(f"{self._limit} requests wait already")
        tag = max(self._reached, self._tags.get(sequence.source, 0.0))
        self._tags[sequence.source] = tag + sequence.limit
        self._order += 1
        self._put(sequence, (-sequence.priority, tag, self._order, sequence.number))

    def put_back(self, sequence: Sequence) -> None:
        """Somebody who was admitted already goes before all of its priority."""
        self._order += 1
        self._put(sequence, (-sequence.priority, -1.0, -self._order, sequence.number))
        self._waiting.move_to_end(sequence.number, last=False)

    def first(self) -> Sequence | None:
        """Who is to be admitted next; the same until the queue changes."""
        while self._heap and self._keys.get(self._heap[0][3]) != self._heap[0]:
            heapq.heappop(self._heap)
        if not self._heap:
            return None
        if self._taken % OLDEST_EVERY == OLDEST_EVERY - 1:
            return next(iter(self._waiting.values()))
        return self._waiting[self._heap[0][3]]

    def take(self, sequence: Sequence) -> None:
        """The one that `first` returned is admitted."""
        _, tag, _, _ = self._keys[sequence.number]
        self._reached = max(self._reached, tag)
        self._taken += 1
        self.remove(sequence.number)

    def remove(self, number: int) -> Sequence | None:
        sequence = self._waiting.pop(number, None)
        if sequence is not None:
            del self._keys[number]
            self._tidy()
        return sequence

    def _tidy(self) -> None:
        """Keep what is kept of those who have gone within the size of the queue."""
        if len(self._heap) > 2 * len(self._waiting) + _SLACK:
            self._heap = sorted(self._keys.values())
        if len(self._tags) > len(self._waiting) + _SLACK:
            self._tags = {s: tag for s, tag in self._tags.items() if tag > self._reached}

    def _put(self, sequence: Sequence, key: tuple[int, float, int, int]) -> None:
        self._waiting[sequence.number] = sequence
        self._keys[sequence.number] = key
        heapq.heappush(self._heap, key)
