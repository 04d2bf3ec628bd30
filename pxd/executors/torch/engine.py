"""The PyTorch engine: transformers' layers and their blocks of KV under `PagedEngine`."""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.checkpoints import read_checkpoint
from pxd.executors.memory import ADVICE, kv_room
from pxd.executors.paged import PagedEngine
from pxd.executors.protocol import ExecutorError, LoadSpec, Progress
from pxd.executors.slots import Report
from pxd.executors.torch.device import choose_device, free_memory
from pxd.executors.torch.kv import KvPool, Rows, token_numbers
from pxd.executors.torch.loader import load_stage
from pxd.executors.torch.stage import Stage
from pxd.executors.torch.tensors import from_wire
from pxd.wire import Buffer, Row, Tensor

log = logging.getLogger("pxd.executors.torch")

DEFAULT_KV_TOKENS = 16_384
"""Where nobody says how much memory there is for them."""


class TorchEngine(PagedEngine):
    """See `pxd.executors.protocol.Engine`. Everything must be called in one thread."""

    def __init__(self, report: Report = lambda _: None) -> None:
        """`report` is called from another thread for every copy of the second tier."""
        super().__init__(load_paged, log, report)


class TorchLayers:
    """A stage and its pool of blocks; see `PagedStage` and `ByteStage`."""

    context = sys.maxsize
    """transformers computes positions beyond what a model was made for, too."""

    def __init__(self, stage: Stage, pool: KvPool, blocks: int) -> None:
        self.first, self.last = stage.first, stage.last
        self.layers, self.hidden_size = stage.layers, stage.hidden_size
        self.vocabulary, self.dtype = stage.vocabulary, stage.dtype
        self.weight_bytes = stage.weight_bytes
        self.blocks, self.block_bytes = blocks, pool.block_bytes
        self.own_memory = stage.device.type == "cuda"
        self._stage = stage
        self._pool = pool

    def forward(
        self, rows: Sequence[Row], tables: Sequence[Sequence[int]], tensor: Tensor, body: Buffer
    ) -> torch.Tensor:
        inputs = from_wire(tensor, body, self._stage.device)
        batch = Rows(
            self._pool,
            [(row.position, row.count, table) for row, table in zip(rows, tables, strict=True)],
        )
        wanted = torch.tensor(_drawn_places(rows), dtype=torch.long, device=self._stage.device)
        return self._stage.forward(inputs, batch.positions, batch, wanted)

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._pool.copy(blocks)

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        return self._pool.read(blocks)

    def write(self, blocks: Sequence[int], data: Sequence[Buffer]) -> None:
        self._pool.write(blocks, data)

    def active_bytes(self, used_blocks: int) -> int:
        """Of a GPU, what PyTorch has taken; of a CPU, weights and those blocks."""
        if self._stage.device.type == "cuda":
            return int(torch.cuda.memory_allocated(self._stage.device))
        return self.weight_bytes + used_blocks * self._pool.block_bytes


def load_paged(spec: LoadSpec, progress: Progress) -> TorchLayers:
    """Raises `ExecutorError`."""
    checkpoint = read_checkpoint(spec)
    device = choose_device()
    try:
        stage = load_stage(Path(spec.path), checkpoint, spec.start, spec.end, device, progress)
        position = token_numbers(stage.shapes) * stage.dtype.itemsize
        planned = spec.kv_bytes or DEFAULT_KV_TOKENS * position
        room = kv_room(planned, free_memory(device), position * BLOCK_TOKENS, ADVICE)
        blocks = room // (position * BLOCK_TOKENS)
        pool = KvPool(stage.shapes, blocks, stage.dtype, stage.device)
    except (
        RuntimeError,
        ValueError,
        KeyError,
        TypeError,
        IndexError,
        AttributeError,
        OSError,
        ImportError,
    ) as error:
        raise ExecutorError(
            f"cannot load layers [{spec.start}, {spec.end}) of {spec.path}: "
            f"{type(error).__name__}: {error}"
        ) from error
    return TorchLayers(stage, pool, blocks)


def _drawn_places(rows: Sequence[Row]) -> list[int]:
    """The places in the step's tensor from whose positions something is drawn."""
    places: list[int] = []
    begin = 0
    for row in rows:
        begin += row.count
        places += range(begin - row.draws, begin)
    return places
