"""Which kind of executor a node runs.

A GPU goes before a CPU, and of two kinds that both have the GPU the faster is taken. On a CPU it is
MLX: there it decodes faster than PyTorch, and it holds quantised weights. SGLang has never been
seen on a GPU and so is only taken by who asks for it.
"""

import importlib.util
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import msgspec

from pxd.cluster.records import Device
from pxd.executors.backends import KINDS
from pxd.executors.inspection import MEASURE_TIMEOUT_S, measure_device
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.settings import ExecutorChoice

GPUS_OF_TORCH = (Path("/dev/nvidiactl"), Path("/dev/dxg"), Path("/dev/kfd"))
"""What NVIDIA's driver, that of Windows in a Linux guest, and AMD's show on Linux."""

ONLY_IF_WANTED = frozenset({"sglang"})

Measure = Callable[[str], Awaitable[Device]]


def installed_kinds() -> tuple[str, ...]:
    """Those whose package is here; whether they work is another question."""
    return tuple(kind for kind in KINDS if importlib.util.find_spec(kind) is not None)


def has_gpu_for_torch() -> bool:
    return any(path.exists() for path in GPUS_OF_TORCH)


async def choose_executor(
    wanted: ExecutorChoice = "auto", *, timeout: float = MEASURE_TIMEOUT_S
) -> Device:
    """The device of the kind of executor to run, which is the only one of its `executors`.

    Each kind that is measured has `timeout` seconds. Raises `ExecutorError` where none works.
    """
    kinds = installed_kinds()
    if wanted != "auto":
        if wanted not in kinds:
            raise ExecutorError(
                f"the {wanted} executor is not installed; pip install 'pxd[{wanted}]'"
            )
        kinds = (wanted,)
    else:
        kinds = tuple(kind for kind in kinds if kind not in ONLY_IF_WANTED)
    measure = partial(measure_device, timeout=timeout)
    return await best_device(kinds, lambda kind: measure(kind=kind), compare=has_gpu_for_torch())


def spread(device: Device, ranks: int) -> Device:
    """What `ranks` of this device are together, at best; stages measure what they really do."""
    return msgspec.structs.replace(
        device,
        memory=device.memory * ranks,
        tflops=device.tflops * ranks,
        bandwidth=device.bandwidth * ranks,
    )


async def best_device(kinds: Sequence[str], measure: Measure, *, compare: bool) -> Device:
    """Of the devices as `kinds` see them, the first that works, or with `compare` the best."""
    found: list[Device] = []
    failures = []
    for kind in kinds:
        try:
            found.append(await measure(kind))
        except (ExecutorError, ExecutorDied) as error:
            failures.append(f"{kind}: {error}")
        if found and not compare:
            break
    if not found:
        raise ExecutorError("; ".join(failures) or f"none of {', '.join(KINDS)} is installed")
    return max(found, key=lambda device: (device.kind != "cpu", device.tflops * device.bandwidth))
