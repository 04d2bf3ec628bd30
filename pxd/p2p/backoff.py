"""How long to wait before the next attempt: doubling with jitter, so that nodes do not march."""

import random


class Backoff:
    """Pure but for `rng`. Delays in seconds."""

    def __init__(self, first: float, longest: float, rng: random.Random) -> None:
        self._first = first
        self._longest = longest
        self._rng = rng
        self._failures = 0

    def next(self) -> float:
        """Between half and all of ``first * 2 ** failures``, at most `longest`."""
        delay = min(self._longest, self._first * 2.0 ** min(self._failures, 32))
        self._failures += 1
        return delay * self._rng.uniform(0.5, 1.0)

    def reset(self) -> None:
        self._failures = 0
