"""Whether a stage fits into the memory that is free, and how much is left for its KV caches."""

import logging

from pxd.executors.protocol import ExecutorError
from pxd.models.describe import Checkpoint

log = logging.getLogger("pxd.executors")

RESERVE = 256 << 20
"""Bytes left for activations and the library's own buffers."""

NOTED = 1.1
"""How many times what was computed a stage may take before the log says so."""

ADVICE = "close other programs, offer less with --memory, or add a node to the cluster"

_GIB = 1 << 30


def stage_bytes(checkpoint: Checkpoint, start: int, end: int) -> int:
    """Bytes of weights that layers [start, end) take, with the model's ends that come with them."""
    layers = sum(checkpoint.layer_bytes[start:end])
    embedding = checkpoint.embedding_bytes if start == 0 else 0
    head = checkpoint.head_bytes if end == checkpoint.layers else 0
    # A tied matrix counts with either end, and is there once.
    both = checkpoint.tied and embedding and head
    return layers + head + (0 if both else embedding)


def check_fits(needed: int, free: int, advice: str) -> None:
    """Raises `ExecutorError`, before anything is loaded, where weights do not fit."""
    if needed + RESERVE > free:
        raise ExecutorError(
            f"these layers take {needed / _GIB:.2f} GiB, and of this machine's memory only "
            f"{max(0, free - RESERVE) / _GIB:.2f} GiB are free for them; {advice}"
        )


def compare(computed: int, taken: int) -> None:
    """Say so where weights took clearly more than was computed: plans counted on less."""
    if taken > NOTED * computed + RESERVE:
        log.warning(
            "the weights take %.2f GiB, although %.2f GiB were computed",
            taken / _GIB,
            computed / _GIB,
        )


def kv_room(planned: int, free: int, least: int, advice: str) -> int:
    """Bytes for KV caches: as many as planned, or what is really there.

    `least` is what one block takes. Raises `ExecutorError` where less than that is there.
    """
    room = min(planned, max(0, free - RESERVE))
    if room < min(planned, least):
        raise ExecutorError(
            f"the weights leave no memory for KV caches: {max(0, free) / _GIB:.2f} GiB are free, "
            f"of which {RESERVE / _GIB:.2f} GiB are kept back; {advice}"
        )
    if room < planned:
        log.warning(
            "%.2f GiB are free for KV caches, less than the %.2f GiB planned",
            room / _GIB,
            planned / _GIB,
        )
    return room
