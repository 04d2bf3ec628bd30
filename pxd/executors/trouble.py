"""What went wrong in a step, in the words of a `Nack`."""

from pxd.wire import NackCode

_NO_MEMORY = (
    "malloc",
    "out of memory",
    "unable to allocate",
    "insufficient memory",
    "can't allocate memory",
    "not enough memory",
)
"""MLX and PyTorch raise a plain `RuntimeError`, in the words of whichever allocator it was."""


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
