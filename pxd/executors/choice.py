"""Which kind of executor a node runs.

On a Mac it is MLX. Elsewhere those that are installed are measured: a GPU goes before a CPU, and
otherwise the faster before the slower. On a CPU that is PyTorch: of a model of 100 million weights
it took a twentieth of MLX's processor time for a prompt, half of it for a token in bfloat16 and two
thirds in float32. Of the smallest models, such as the bundled one, MLX decodes faster.
"""

import importlib.util
import sys
from collections.abc import Awaitable, Callable, Sequence
from functools import partial

from pxd.cluster.records import Device
from pxd.executors.backends import KINDS
from pxd.executors.inspection import MEASURE_TIMEOUT_S, measure_device
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.settings import ExecutorChoice

Measure = Callable[[str], Awaitable[Device]]


def installed_kinds() -> tuple[str, ...]:
    """Those whose package is here; whether they work is another question."""
    return tuple(kind for kind in KINDS if importlib.util.find_spec(kind) is not None)


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
    measure = partial(measure_device, timeout=timeout)
    return await best_device(kinds, lambda kind: measure(kind=kind))


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
