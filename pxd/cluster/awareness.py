"""How well this node itself keeps up: who is slow should be slow to accuse others.

The local health multiplier of "Lifeguard: SWIM-ing with Situational Awareness" (Dadgar, Phillips,
Currey 2018), after memberlist's awareness.go.
"""


class Awareness:
    """`score` runs from 0, healthy, to `worst`."""

    def __init__(self, worst: int) -> None:
        self._worst = worst
        self.score = 0

    @property
    def scale(self) -> int:
        """By what to multiply the intervals and timeouts of probes."""
        return self.score + 1

    def worsen(self, by: int = 1) -> None:
        self.score = min(self._worst, self.score + by)

    def improve(self) -> None:
        self.score = max(0, self.score - 1)
