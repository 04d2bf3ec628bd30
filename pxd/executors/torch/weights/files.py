"""The tensors of a stage in the files that are there, unread."""

import contextlib
import threading
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from pxd.executors.protocol import Progress
from pxd.executors.torch.weights.formats import Quantization
from pxd.executors.torch.weights.mlx import one_by_one
from pxd.executors.torch.weights.stored import DTYPES, Stored
from pxd.models.describe import Checkpoint


class StageTensors:
    """Tensors by name, those of other layers left out, and the type of the own layers' numbers.

    Reports up to 0.99: the trial is still to come.
    """

    def __init__(
        self,
        directory: Path,
        checkpoint: Checkpoint,
        start: int,
        end: int,
        quantization: Quantization | None,
        files: contextlib.ExitStack,
        progress: Progress,
    ) -> None:
        """Raises `ExecutorError` where quantised weights are not as the configuration says."""
        self._progress, self._lock = progress, threading.Lock()
        self._done, self._total = 0, sum(checkpoint.layer_bytes[start:end]) or 1
        stored: dict[str, Stored] = {}
        kinds: Counter[str] = Counter()
        for name in sorted({*checkpoint.shards.values()} - {*checkpoint.missing}):
            file = files.enter_context(safe_open(directory / name, framework="pt"))
            for tensor in file.keys():  # noqa: SIM118 - it is no mapping
                layer = checkpoint.layer_of(tensor)
                if layer is None or start <= layer < end:
                    stored[tensor] = unread = _Unread(file.get_slice(tensor), self._read)
                    kinds[unread.get_dtype()] += layer is not None
        common = next((kind for kind, _ in kinds.most_common() if kind in DTYPES), None)
        if common is None or (quantization and not quantization.typed):
            self.dtype: torch.dtype = getattr(torch, checkpoint.dtype)
        else:
            self.dtype = DTYPES[common]
        self.named = one_by_one(quantization.spread(stored, self.dtype) if quantization else stored)

    def _read(self, nbytes: int) -> None:
        # transformers reads from several threads.
        with self._lock:
            self._done += nbytes
            self._progress(min(0.99, self._done / self._total))


class _Unread:
    """A tensor in a file, which is read when it is indexed."""

    def __init__(self, there: Any, read: Any) -> None:
        self._there, self._read = there, read

    def __getitem__(self, index: Any) -> torch.Tensor:
        tensor: torch.Tensor = self._there[index]
        self._read(tensor.nbytes)
        return tensor

    def get_shape(self) -> list[int]:
        shape: list[int] = self._there.get_shape()
        return shape

    def get_dtype(self) -> str:
        dtype: str = self._there.get_dtype()
        return dtype
