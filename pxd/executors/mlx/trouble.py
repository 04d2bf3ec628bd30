"""What went wrong in a step, in the words of a `Nack`."""

from collections.abc import Sequence

import mlx.core as mx

from pxd.wire import NackCode

_NO_MEMORY = ("malloc", "out of memory", "unable to allocate", "insufficient memory")
"""MLX raises a plain `RuntimeError`, in the words of whichever allocator it was."""


class NotFinite(Exception):
    """The model computed NaN or infinity for these requests."""

    def __init__(self, what: str, requests: tuple[int, ...]) -> None:
        super().__init__(f"{what} of requests {requests} are not finite")


def code_of(error: Exception) -> NackCode:
    if isinstance(error, NotFinite):
        return "not-finite"
    return "out-of-memory" if is_out_of_memory(error) else "executor-failed"


def is_out_of_memory(error: Exception) -> bool:
    if isinstance(error, MemoryError):
        return True
    words = str(error).lower()
    return isinstance(error, RuntimeError) and any(word in words for word in _NO_MEMORY)


def mark_of(hidden: mx.array) -> mx.array:
    """One number that is finite if all of `hidden` are, to be evaluated along with them."""
    # Zero times NaN or infinity is NaN, and no sum of zeros overflows.
    return (hidden * 0).sum()


def is_finite(mark: mx.array) -> bool:
    return bool(mx.isfinite(mark).item())


def not_finite_among(arrays: Sequence[mx.array]) -> list[int]:
    """The places of those arrays that are not finite throughout."""
    return [i for i, array in enumerate(arrays) if not is_finite(mark_of(array))]
