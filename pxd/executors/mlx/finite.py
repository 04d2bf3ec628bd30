"""Whether arrays are finite."""

from collections.abc import Sequence

import mlx.core as mx


def mark_of(hidden: mx.array) -> mx.array:
    """One number that is finite if all of `hidden` are, to be evaluated along with them."""
    # Zero times NaN or infinity is NaN, and no sum of zeros overflows.
    return (hidden * 0).sum()


def is_finite(mark: mx.array) -> bool:
    return bool(mx.isfinite(mark).item())


def not_finite_among(arrays: Sequence[mx.array]) -> list[int]:
    """The places of those arrays that are not finite throughout."""
    return [i for i, array in enumerate(arrays) if not is_finite(mark_of(array))]
