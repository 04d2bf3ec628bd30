"""A small seeded generator: the state machines draw lots but must replay exactly."""

from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")

_MASK = (1 << 64) - 1


class SplitMix64:
    """Sebastiano Vigna's SplitMix64. Not for secrets."""

    def __init__(self, seed: int) -> None:
        self._state = seed & _MASK

    def next(self) -> int:
        """Uniform in [0, 2^64)."""
        self._state = (self._state + 0x9E3779B97F4A7C15) & _MASK
        mixed = self._state
        mixed = ((mixed ^ (mixed >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        mixed = ((mixed ^ (mixed >> 27)) * 0x94D049BB133111EB) & _MASK
        return mixed ^ (mixed >> 31)

    def below(self, bound: int) -> int:
        """Uniform in [0, bound), up to a bias of bound / 2^64."""
        return (self.next() * bound) >> 64

    def fraction(self) -> float:
        """Uniform in [0, 1)."""
        return (self.next() >> 11) / (1 << 53)

    def sample(self, items: Sequence[T], count: int) -> list[T]:
        """Up to `count` different items in random order (Fisher-Yates)."""
        # Only what has changed places is noted, so that a few out of many cost little.
        moved: dict[int, T] = {}
        chosen = []
        for index in range(min(count, len(items))):
            other = index + self.below(len(items) - index)
            chosen.append(moved[other] if other in moved else items[other])
            moved[other] = moved[index] if index in moved else items[index]
        return chosen
