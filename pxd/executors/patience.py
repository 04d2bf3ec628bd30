"""How long a worker may take for a step before it counts as hung."""

FACTOR = 20.0
LEAST_S, MOST_S = 30.0, 300.0
FADING = 0.99
"""Of the longest time that steps of a size took, at every later one of that size."""


class Patience:
    """Learns from what steps really took. Sizes are classes of positions: 1, 2-3, 4-7 and so on.

    The limit is `FACTOR` times what is to be expected, from `least` to `most` seconds: contexts
    grow, and machines are busy with other things.
    """

    def __init__(self, least: float = LEAST_S, most: float = MOST_S) -> None:
        self._least, self._most = least, most
        self._took: dict[int, float] = {}

    def took(self, positions: int, seconds: float) -> None:
        if positions > 0:
            size = positions.bit_length()
            self._took[size] = max(seconds, self._took.get(size, 0.0) * FADING)

    def limit(self, positions: int) -> float:
        """In seconds; `most` for the first step, which compiles what all others use."""
        expected = self._expected(max(1, positions).bit_length())
        if expected is None:
            return self._most
        return min(max(FACTOR * expected, self._least), self._most)

    def _expected(self, size: int) -> float | None:
        """Never too little: a larger step takes at most as much longer as it has more positions."""
        smaller = [known for known in self._took if known <= size]
        if smaller:
            nearest = max(smaller)
            return self._took[nearest] * float(1 << (size - nearest))
        return self._took[min(self._took)] if self._took else None
