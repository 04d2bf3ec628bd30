"""Measures the device as MLX sees it."""

from collections.abc import Callable

import mlx.core as mx
import psutil

from pxd.cluster.records import Device
from pxd.executors.rates import COLUMNS, measured


def measure() -> Device:
    """Takes one to two seconds."""
    kind, name, memory = _identify()
    return measured(kind=kind, name=name, memory=memory, executor="mlx", matmul=_matmul, read=_read)


def _identify() -> tuple[str, str, int]:
    info = mx.device_info()
    name = str(info.get("device_name", ""))
    system = psutil.virtual_memory().total
    if mx.default_device() != mx.gpu:
        return "cpu", name, system
    kind = "metal" if mx.metal.is_available() else "cuda"
    memory = info.get("total_memory") or info.get("memory_size") or system
    return kind, name, int(memory)


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
