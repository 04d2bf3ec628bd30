"""A stage on several GPUs of one machine: tensor parallelism, in which every rank is a process.

The worker is rank 0. It starts the others and tells each of them what it does itself, in the same
order; what they compute meets in SGLang's collective operations. A rank that fails or dies leaves
the others waiting in one, and so ends them all: the daemon sees that its executor has died.
"""

import logging
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import msgspec
import torch

from pxd.executors.frames import FrameSocket, exit_with_parent, when_gone
from pxd.executors.protocol import ExecutorError
from pxd.executors.sglang.passes import Pass, passes_of
from pxd.executors.sglang.runtime import RankSpec
from pxd.executors.sglang.stage import RankStage
from pxd.wire import Buffer, Row, Tensor

log = logging.getLogger("pxd.executors.sglang")

ResultT = TypeVar("ResultT")


class Begin(msgspec.Struct, frozen=True, tag="begin"):
    spec: RankSpec


class RunPasses(msgspec.Struct, frozen=True, tag="run"):
    """The body is what `tensor` says: what comes into the stage."""

    passes: tuple[Pass, ...]
    tensor: Tensor


class CopyBlocks(msgspec.Struct, frozen=True, tag="copy"):
    pairs: tuple[tuple[int, int], ...]


class Begun(msgspec.Struct, frozen=True, tag="begun"):
    """All layers are there, with so many blocks and bytes of weights."""

    blocks: int
    weight_bytes: int


Order = Begin | RunPasses | CopyBlocks

order_decoder: msgspec.msgpack.Decoder[Order] = msgspec.msgpack.Decoder(Order)
begun_decoder: msgspec.msgpack.Decoder[Begun] = msgspec.msgpack.Decoder(Begun)


class _Others:
    """The ranks besides this one."""

    def __init__(self, spec: RankSpec) -> None:
        self._frames = [self._start(spec, rank) for rank in range(1, spec.size)]

    def _start(self, spec: RankSpec, rank: int) -> FrameSocket[Begun]:
        ours, theirs = socket.socketpair()
        with theirs:
            command = [sys.executable, "-m", "pxd.executors.sglang.ranks", str(theirs.fileno())]
            handed = [theirs.fileno(), spec.meeting]
            subprocess.Popen(command, pass_fds=handed, stdin=subprocess.DEVNULL)
        when_gone(ours, lambda: _die(f"rank {rank} is gone"))
        frames = FrameSocket(ours, begun_decoder)
        frames.send(Begin(msgspec.structs.replace(spec, rank=rank)))
        return frames

    def begun(self) -> list[Begun]:
        """Waits until all of them are."""
        return [frames.receive()[0] for frames in self._frames]

    def tell(self, order: Order, body: Buffer = b"") -> None:
        for frames in self._frames:
            frames.send(order, body)


def _die(reason: str) -> None:
    log.error("%s; nothing can go on without it", reason)
    os._exit(1)


class NodeStage:
    """A stage on one GPU or several: rank 0 of it. See `pxd.executors.paged.PagedStage`."""

    def __init__(self, spec: RankSpec) -> None:
        """Loads everywhere. Raises `ExecutorError`, and whatever SGLang raises; where there are
        several ranks, what goes wrong may end this process."""
        self._others = _Others(spec)
        self._rank = rank = RankStage(spec)
        self._several = spec.size > 1
        begun = self._others.begun()
        self.first, self.last, self.layers = rank.first, rank.last, rank.layers
        self.hidden_size, self.vocabulary = rank.hidden_size, rank.vocabulary
        self.context, self.dtype = rank.context, rank.dtype
        self.blocks = min([rank.blocks, *(other.blocks for other in begun)])
        self.weight_bytes = rank.weight_bytes + sum(other.weight_bytes for other in begun)

    def forward(
        self, rows: Sequence[Row], tables: Sequence[Sequence[int]], tensor: Tensor, body: Buffer
    ) -> torch.Tensor:
        passes = passes_of(rows, tables, self._rank.most_entries)
        self._others.tell(RunPasses(tuple(passes), tensor), body)
        return self._together(lambda: self._rank.forward(passes, tensor, body))

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        self._others.tell(CopyBlocks(tuple(blocks)))
        self._together(lambda: self._rank.copy(blocks))

    def active_bytes(self, used_blocks: int) -> int:
        """Of the first GPU, where there are several."""
        return self._rank.active_bytes(used_blocks)

    def _together(self, act: Callable[[], ResultT]) -> ResultT:
        """Do what the other ranks do, too. If it fails here alone, they would wait forever."""
        try:
            return act()
        except Exception as error:
            if self._several:
                log.exception("a step failed on rank 0")
                raise SystemExit(1) from error
            raise


def load_ranks(spec: RankSpec) -> NodeStage:
    """Load a stage; `spec.meeting` is made here. Raises `ExecutorError` as `NodeStage` does."""
    # Never closed: ranks may meet again, when they first need a connection of another kind.
    return NodeStage(msgspec.structs.replace(spec, meeting=os.memfd_create("pxd-ranks")))


def serve(descriptor: int) -> int:
    """Be a rank on the socket `descriptor` until rank 0 is gone; returns the exit code."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    connection = socket.socket(fileno=descriptor)
    exit_with_parent(connection)
    frames = FrameSocket(connection, order_decoder)
    stage: RankStage | None = None
    while True:
        try:
            order, body = frames.receive()
        except EOFError:
            return 0
        match order:
            case Begin(spec):
                stage = RankStage(spec)
                frames.send(Begun(stage.blocks, stage.weight_bytes))
            case RunPasses(passes, tensor) if stage is not None:
                stage.forward(passes, tensor, body)
            case CopyBlocks(pairs) if stage is not None:
                stage.copy(pairs)
            case _:
                raise ExecutorError(f"a rank that holds nothing cannot do {order}")


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1])))
