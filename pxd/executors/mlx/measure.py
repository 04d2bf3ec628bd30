"""Measures the device as MLX sees it."""

from collections.abc import Callable

import mlx.core as mx
import psutil

from pxd import hardware
from pxd.cluster.records import Device
from pxd.executors.rates import COLUMNS, measured


def measure() -> Device:
    """Takes one to two seconds."""
    kind, name, memory = _identify()
    return measured(
        kind=kind,
        name=name,
        memory=memory,
        memory_limit=wired_limit(),
        executor="mlx",
        matmul=_matmul,
        read=_read,
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


def _matmul(side: int) -> Callable[[], None]:
    a = mx.ones((side, side), mx.bfloat16)
    b = mx.ones((side, side), mx.bfloat16)
    mx.eval(a, b)
    return lambda: mx.eval(a @ b)


def _read(size: int) -> Callable[[], None]:
    weights = mx.ones((size // (4 * COLUMNS), COLUMNS), mx.float32)
    position = mx.ones((1, COLUMNS), mx.float32)
    mx.eval(weights, position)
    return lambda: mx.eval(position @ weights.T)
