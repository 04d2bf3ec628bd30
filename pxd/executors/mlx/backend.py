"""What the MLX executor offers to the worker."""

from pathlib import Path

from pxd.cluster.records import Device
from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.mlx.measure import measure
from pxd.executors.protocol import Engine, ModelDescription


class MlxBackend:
    def engine(self) -> Engine:
        return MlxEngine()

    def describe(self, path: Path) -> ModelDescription:
        return describe(path)

    def measure(self) -> Device:
        return measure()
