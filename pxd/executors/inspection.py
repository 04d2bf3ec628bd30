"""Short-lived workers that look at a model or at the device, or make a model, and go."""

from pathlib import Path

import trio

from pxd.cluster.records import Device
from pxd.executors.process import open_executor
from pxd.executors.protocol import ExecutorError, ModelDescription, Progress

DESCRIBE_TIMEOUT_S = 180.0
MEASURE_TIMEOUT_S = 120.0


async def describe_model(
    path: Path,
    *,
    kind: str = "mlx",
    scratch_root: Path | None = None,
    timeout: float = DESCRIBE_TIMEOUT_S,
) -> ModelDescription:
    """Describe the model in the directory `path`; its weights need not be complete.

    Raises `ExecutorError` when the model cannot be served here at all or `timeout` seconds pass,
    and `ExecutorDied`.
    """
    with trio.move_on_after(timeout):
        async with open_executor(kind, scratch_root=scratch_root) as executor:
            return await executor.describe(path)
    raise ExecutorError(f"{path} could not be described within {timeout:g} s")


async def measure_device(*, kind: str = "mlx", timeout: float = MEASURE_TIMEOUT_S) -> Device:
    """Measure this machine's device for one to two seconds, plus the start of a process.

    Raises `ExecutorError` and `ExecutorDied`.
    """
    with trio.move_on_after(timeout):
        async with open_executor(kind) as executor:
            return await executor.measure()
    raise ExecutorError(f"the device could not be measured within {timeout:g} s")


async def quantize_model(source: Path, target: Path, bits: int, progress: Progress) -> None:
    """Write a quantised copy of the model in `source` into the new directory `target`; if that
    fails, what is there may stay. Raises `ExecutorError` and `ExecutorDied`.
    """
    async with open_executor("mlx") as executor:
        await executor.quantize(source, target, bits, progress)
