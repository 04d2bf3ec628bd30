"""What the PyTorch executor offers to the worker."""

from pathlib import Path

from pxd.cluster.records import Device
from pxd.executors.protocol import Engine, ModelDescription
from pxd.executors.slots import Report

# Imported where they are used: transformers takes seconds, and a worker needs but one of these.


class TorchBackend:
    def __init__(self) -> None:
        """Raises ImportError where there is no PyTorch."""
        import torch  # noqa: F401

    def engine(self, report: Report) -> Engine:
        from pxd.executors.torch.engine import TorchEngine

        return TorchEngine(report)

    def describe(self, path: Path) -> ModelDescription:
        from pxd.executors.torch.describe import describe

        return describe(path)

    def measure(self) -> Device:
        from pxd.executors.torch.measure import measure

        return measure()
