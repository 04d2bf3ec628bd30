"""The kinds of executor. Their tensor libraries are imported in worker processes only."""

from pathlib import Path
from typing import Protocol, runtime_checkable

from pxd.cluster.records import Device
from pxd.executors.protocol import Engine, ExecutorError, ModelDescription, Progress
from pxd.executors.slots import Report

KINDS = ("mlx", "torch", "sglang")


class Backend(Protocol):
    """What one kind of executor can do inside its worker process."""

    def engine(self, report: Report) -> Engine:
        """`report` may be called from any thread, for every copy that is done."""

    def describe(self, path: Path) -> ModelDescription:
        """Raises `ExecutorError` when nothing of this model could ever be loaded."""

    def measure(self) -> Device:
        """Measure the device for about a second."""


@runtime_checkable
class Quantizer(Protocol):
    """What a backend offers beyond that if it can also quantise models."""

    def quantize(self, source: Path, target: Path, bits: int, progress: Progress) -> None:
        """Write a quantised copy of the model in `source` into the new directory `target`."""


def load_backend(kind: str) -> Backend:
    """Raises `ExecutorError` for an unknown kind or one that is not installed."""
    if kind not in KINDS:
        raise ExecutorError(f"no executor kind {kind!r}; there is {', '.join(KINDS)}")
    try:
        if kind == "torch":
            from pxd.executors.torch.backend import TorchBackend

            return TorchBackend()
        if kind == "sglang":
            from pxd.executors.sglang.backend import SglangBackend

            return SglangBackend()
        from pxd.executors.mlx.backend import MlxBackend

        return MlxBackend()
    except (ImportError, ValueError, OSError) as error:
        raise ExecutorError(f"the {kind} executor cannot be used here: {error}") from error
