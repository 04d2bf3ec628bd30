"""Keeps requests away from a pipeline that fails again and again.

A circuit breaker as in Nygard, "Release It!" (2007). No clock: callers bring the times, in seconds.
"""

from typing import Literal

CircuitState = Literal["closed", "half-open", "open"]

FAILURES_TO_OPEN = 3
PAUSES_S = (1.0, 2.0, 5.0, 10.0, 30.0)


class Circuit:
    """One pipeline's. Closed: it takes requests. Open: it takes none for a pause.

    After the pause it is half-open: it takes one request as a probe, and another one only after the
    next pause, so that a probe whose outcome nobody hears of blocks nothing. A success closes it.
    """

    __slots__ = ("_failures", "_latest", "_probe_at")

    def __init__(self) -> None:
        self._failures = 0
        self._latest = self._probe_at = float("-inf")

    def state(self, now: float) -> CircuitState:
        if self._failures < FAILURES_TO_OPEN:
            return "closed"
        return "half-open" if now >= self._probe_at else "open"

    def taken(self, now: float) -> None:
        """A request is sent there."""
        if self.state(now) == "half-open":
            self._probe_at = now + self._pause

    def failed(self, began: float, now: float) -> None:
        """A request failed that was sent at `began`.

        What many requests lose at once is one failure: who was sent before the latest one that
        counted says nothing new.
        """
        if began < self._latest:
            return
        self._failures += 1
        self._latest = now
        if self._failures >= FAILURES_TO_OPEN:
            self._probe_at = now + self._pause

    def succeeded(self, began: float) -> None:
        """A request got what it wanted that was sent at `began`; before the latest failure, and it
        says nothing new either."""
        if began >= self._latest:
            self._failures = 0

    @property
    def _pause(self) -> float:
        return PAUSES_S[min(self._failures - FAILURES_TO_OPEN, len(PAUSES_S) - 1)]
