"""What the MLX executor offers to the worker."""

from pathlib import Path

from pxd.cluster.records import Device
from pxd.executors.protocol import Engine, ModelDescription, Progress
from pxd.executors.slots import Report

# Imported where they are used: mlx-lm takes seconds, and a worker needs but one of these.


class MlxBackend:
    def __init__(self) -> None:
        """Raises ImportError where there is no MLX."""
        import mlx.core  # noqa: F401

    def engine(self, report: Report) -> Engine:
        from pxd.executors.mlx.engine import MlxEngine

        return MlxEngine(report)

    def describe(self, path: Path) -> ModelDescription:
        from pxd.executors.mlx.describe import describe

        return describe(path)

    def measure(self) -> Device:
        from pxd.executors.mlx.measure import measure

        return measure()

    def quantize(self, source: Path, target: Path, bits: int, progress: Progress) -> None:
        from pxd.executors.mlx.quantize import quantize

        quantize(source, target, bits, progress)
