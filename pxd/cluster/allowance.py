"""A token bucket: how much of something may happen at once, and how much of it in the long run."""

_ROUNDING = 1e-6


class Allowance:
    """Up to `burst` at once and `rate` per second on average; full at first. `rate` may change."""

    def __init__(self, rate: float, burst: float) -> None:
        self.rate = rate
        self._burst = burst
        self._left = burst
        self._at: float | None = None

    def has(self, now: float, amount: float = 1.0) -> bool:
        if self._at is not None:
            self._left = min(self._burst, self._left + max(0.0, now - self._at) * self.rate)
        self._at = now
        return self._left + _ROUNDING >= amount

    def take(self, now: float, amount: float = 1.0, *, reserve: float = 0.0) -> bool:
        """Take `amount` if that leaves `reserve`; says whether it did."""
        if not self.has(now, amount + reserve):
            return False
        self._left -= amount
        return True

    def take_up_to(self, now: float, amount: int) -> int:
        """Take as much of `amount` as there is; returns how much that is."""
        self.has(now)
        taken = min(amount, int(self._left + _ROUNDING))
        self._left -= taken
        return taken

    def ready_at(self, amount: float = 1.0) -> float:
        """When `amount` can be taken if nothing is until then."""
        missing = amount - self._left
        if self._at is None or missing <= _ROUNDING:
            return self._at or 0.0
        return self._at + missing / self.rate
