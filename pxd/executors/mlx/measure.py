"""Measures the device: what kind, how much memory, how fast at matrices and at reading memory."""

import time
from collections.abc import Callable

import mlx.core as mx
import psutil

from pxd import hardware
from pxd.cluster.records import Device

BUDGET_S = 0.6
GROWTH = 2
FIRST_SIDE, LAST_SIDE = 256, 8192
FIRST_BYTES, LAST_BYTES = 32 << 20, 1 << 30


def measure() -> Device:
    """Takes one to two seconds. Speeds are the best seen, memory is what the device has in all."""
    kind, name, memory = _identify()
    return Device(
        kind=kind,
        name=name[:128],
        memory=memory,
        memory_limit=wired_limit(),
        tflops=round(_best(_matmul_rate, FIRST_SIDE, LAST_SIDE) / 1e12, 4),
        bandwidth=round(_best(_read_rate, FIRST_BYTES, min(LAST_BYTES, memory // 8)) / 1e9, 2),
        executors=("mlx",),
    )


def _identify() -> tuple[str, str, int]:
    info = mx.device_info()
    name = str(info.get("device_name", ""))
    system = psutil.virtual_memory().total
    if mx.default_device() != mx.gpu:
        return "cpu", name, system
    kind = "metal" if mx.metal.is_available() else "cuda"
    memory = info.get("total_memory") or info.get("memory_size") or system
    return kind, name, int(memory)


def wired_limit() -> int:
    """Bytes that macOS lets the GPU hold at a time, of the memory it shares; 0 without such."""
    if mx.default_device() != mx.gpu or not mx.metal.is_available():
        return 0
    return int(mx.device_info().get("max_recommended_working_set_size") or 0)


def free_memory() -> int:
    """Bytes that this process could still allocate on the device."""
    if has_own_memory():
        return _identify()[2] - mx.get_active_memory()
    free, limit = hardware.memory_available(), wired_limit()
    return min(free, limit - mx.get_active_memory()) if limit else free


def has_own_memory() -> bool:
    """Whether the device does not share the memory of the host."""
    return bool(mx.default_device() == mx.gpu) and not mx.metal.is_available()


def _best(rate: Callable[[int], float], first: int, last: int) -> float:
    """The best rate over growing sizes, until the time is up."""
    best, size = 0.0, first
    end = time.perf_counter() + BUDGET_S
    while size <= last and time.perf_counter() < end:
        best = max(best, rate(size), rate(size))
        size *= GROWTH
    return best


def _seconds(make: Callable[[], mx.array]) -> float:
    begin = time.perf_counter()
    mx.eval(make())
    return max(time.perf_counter() - begin, 1e-9)


def _matmul_rate(side: int) -> float:
    """FLOP/s of a square bfloat16 product."""
    a = mx.ones((side, side), mx.bfloat16)
    b = mx.ones((side, side), mx.bfloat16)
    mx.eval(a, b)
    return 2 * side**3 / _seconds(lambda: a @ b)


def _read_rate(size: int) -> float:
    """Bytes/s of a linear layer on one position, which is what decoding waits for."""
    columns = 4096
    weights = mx.ones((size // (4 * columns), columns), mx.float32)
    position = mx.ones((1, columns), mx.float32)
    mx.eval(weights, position)
    return weights.nbytes / _seconds(lambda: position @ weights.T)
