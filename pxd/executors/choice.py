"""Which kind of executor a node runs.

On a Mac it is MLX. Elsewhere those that are installed are measured: a GPU goes before a CPU, and
otherwise the faster before the slower. On a CPU that is PyTorch: of a model of 100 million
weights in bfloat16 it took a twentieth of the processor time of MLX for a prompt and half of it for
a token. Of the smallest models, such as the bundled one, a token takes about the same with either.
SGLang has never been seen on a GPU and so is only taken by who asks for it.
"""

import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from importlib import metadata

import msgspec

from pxd.cluster.records import Device
from pxd.executors.backends import KINDS
from pxd.executors.inspection import MEASURE_TIMEOUT_S, measure_device
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.settings import ExecutorChoice

ONLY_IF_WANTED = frozenset({"sglang"})

Measure = Callable[[str], Awaitable[Device]]


def installed_kinds() -> tuple[str, ...]:
    """Those whose package is here; whether they work is another question."""
    # Not by a look for modules, which `without_torch` leads astray.
    return tuple(kind for kind in KINDS if any(metadata.Distribution.discover(name=kind)))


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
    elif sys.platform == "darwin" and "mlx" in kinds:
        kinds = ("mlx",)
    else:
        kinds = tuple(kind for kind in kinds if kind not in ONLY_IF_WANTED)
    measure = partial(measure_device, timeout=timeout)
    return await best_device(kinds, lambda kind: measure(kind=kind))


def spread(device: Device, ranks: int) -> Device:
    """What `ranks` of this device are together, at best; stages measure what they really do."""
    return msgspec.structs.replace(
        device,
        memory=device.memory * ranks,
        tflops=device.tflops * ranks,
        bandwidth=device.bandwidth * ranks,
    )


async def best_device(kinds: Sequence[str], measure: Measure) -> Device:
    """Of the devices as `kinds` see them, the best. Raises `ExecutorError` if none works."""
    found, failures = [], []
    for kind in kinds:
        try:
            found.append(await measure(kind))
        except (ExecutorError, ExecutorDied) as error:
            failures.append(f"{kind}: {error}")
    if not found:
        raise ExecutorError("; ".join(failures) or f"none of {', '.join(KINDS)} is installed")
    return max(found, key=lambda device: (device.kind != "cpu", device.tflops * device.bandwidth))
