"""How a device is measured: how fast at matrices, and at reading memory."""

import time
from collections.abc import Callable

from pxd.cluster.records import Device

BUDGET_S = 0.6
GROWTH = 2
FIRST_SIDE, LAST_SIDE = 256, 8192
FIRST_BYTES, LAST_BYTES = 32 << 20, 1 << 30
COLUMNS = 4096

Rate = Callable[[int], Callable[[], None]]
"""For a size, what is to be timed."""


def measured(
    *,
    kind: str,
    name: str,
    memory: int,
    executor: str,
    matmul: Rate,
    read: Rate,
    memory_limit: int = 0,
) -> Device:
    """Takes one to two seconds. Speeds are the best seen, memory is what the device has in all.

    `matmul` multiplies two square bfloat16 matrices of a size; `read` runs a linear layer with so
    many bytes of float32 weights, ``(rows, COLUMNS)``, on one position, which is what decoding
    waits for.
    """
    flops = _best(matmul, lambda side: 2.0 * side**3, FIRST_SIDE, LAST_SIDE)
    read_bytes = _best(read, float, FIRST_BYTES, min(LAST_BYTES, memory // 8))
    return Device(
        kind=kind,
        name=name[:128],
        memory=memory,
        memory_limit=memory_limit,
        tflops=round(flops / 1e12, 4),
        bandwidth=round(read_bytes / 1e9, 2),
        executors=(executor,),
    )


def _best(rate: Rate, work: Callable[[int], float], first: int, last: int) -> float:
    """The most work per second over growing sizes, until the time is up."""
    best, size = 0.0, first
    end = time.perf_counter() + BUDGET_S
    while size <= last and time.perf_counter() < end:
        run = rate(size)
        best = max(best, work(size) / min(_seconds(run), _seconds(run)))
        size *= GROWTH
    return best


def _seconds(run: Callable[[], None]) -> float:
    begin = time.perf_counter()
    run()
    return max(time.perf_counter() - begin, 1e-9)
