"""Who has to be done by when."""

import heapq
import math
from collections.abc import Callable

_SLACK = 64


class Deadlines:
    """`alive` says of a request's number whether it has still to be watched; there are `count()`.

    Nobody says when a request ends early: its entry is found to be stale later, so that a deadline
    costs next to nothing on the way of every request that keeps it.
    """

    def __init__(self, alive: Callable[[int], bool], count: Callable[[], int]) -> None:
        self._alive, self._count = alive, count
        self._heap: list[tuple[float, int]] = []

    def add(self, number: int, deadline: float) -> None:
        if deadline == math.inf:
            return
        if len(self._heap) > 2 * self._count() + _SLACK:
            self._heap = sorted(entry for entry in self._heap if self._alive(entry[1]))
        heapq.heappush(self._heap, (deadline, number))

    def first(self) -> float:
        """The next deadline; infinity if there is none."""
        while self._heap and not self._alive(self._heap[0][1]):
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else math.inf

    def take_due(self, now: float) -> list[int]:
        """Those whose deadline is over, the earliest first."""
        due = []
        while self.first() <= now:
            due.append(heapq.heappop(self._heap)[1])
        return due
