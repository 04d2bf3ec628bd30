"""How large steps may be, after a stage had no memory for one."""

LEAST_POSITIONS = 16
EASE_STEPS, MOST_EASE_STEPS = 32, 4096


class Pressure:
    """`positions` in a step and `running` requests are the most that is tried now."""

    def __init__(self, positions: int, running: int) -> None:
        """Begins with the most there may ever be."""
        self.positions, self.running = positions, running
        self._most = positions, running
        self._good, self._needed = 0, EASE_STEPS

    def shrink(self, positions: int, running: int) -> bool:
        """A step of so many positions had no memory while so many requests ran.

        Shorter pieces of prompts come first, for they cost least; then fewer requests run at once.
        Returns False if nothing smaller is left to be tried.
        """
        if positions > LEAST_POSITIONS:
            self.positions = min(self.positions, max(LEAST_POSITIONS, positions // 4))
        elif running > 1:
            self.running = min(self.running, running // 2)
        else:
            return False
        self._good, self._needed = 0, min(2 * self._needed, MOST_EASE_STEPS)
        return True

    def ease(self) -> None:
        """A step is done, and nobody is left who had to begin again: allow more after a while.

        The while grows, so that who cannot take more does not try it for ever.
        """
        if (self.positions, self.running) == self._most:
            return
        self._good += 1
        if self._good >= self._needed:
            self._good = 0
            self.positions = min(2 * self.positions, self._most[0])
            self.running = min(2 * self.running, self._most[1])
