"""An engine in a worker process, called as if it were here: a process holds one SGLang stage."""

import contextlib
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import msgspec

from pxd.executors import scratch
from pxd.executors.frames import FrameSocket
from pxd.executors.messages import (
    Describe,
    Described,
    Failed,
    Load,
    Loaded,
    LoadProgress,
    Memory,
    ReadMemory,
    Reply,
    SendAs,
    reply_decoder,
)
from pxd.executors.process import worker_environment
from pxd.executors.protocol import (
    ExecutorError,
    LoadSpec,
    MemoryReport,
    ModelDescription,
    Progress,
    Scored,
    StageInfo,
    StepOutput,
    StepRejected,
)
from pxd.wire import Buffer, Coding, Nack, Sampled, Step

TIMEOUT_S = 600.0


class RemoteEngine:
    """See `pxd.executors.protocol.Engine`. Raises `EOFError` once the process is gone."""

    def __init__(self, kind: str = "sglang") -> None:
        self._ours, theirs = socket.socketpair()
        self._ours.settimeout(TIMEOUT_S)
        self._scratch = scratch.name_directory(None)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-m", "pxd.executors.worker", kind, str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                stdin=subprocess.DEVNULL,
                env={**worker_environment(), scratch.VARIABLE: str(self._scratch)},
            )
        self._frames: FrameSocket[Reply] = FrameSocket(self._ours, reply_decoder)

    def close(self) -> None:
        self._frames.close()
        self.process.kill()
        self.process.wait(TIMEOUT_S)
        scratch.remove(self._scratch)

    def _ask(self, command: Any) -> tuple[Reply, Buffer]:
        self._frames.send(command)
        return self._answer(lambda _: None)

    def _answer(self, progress: Progress) -> tuple[Reply, Buffer]:
        while True:
            reply, body = self._frames.receive()
            if isinstance(reply, LoadProgress):
                progress(reply.done)
            elif isinstance(reply, Failed):
                raise ExecutorError(reply.reason)
            else:
                return reply, body

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        self._frames.send(Load(spec))
        reply, _ = self._answer(progress)
        assert isinstance(reply, Loaded)
        return reply.info

    def describe(self, path: str) -> ModelDescription:
        reply, _ = self._ask(Describe(path))
        assert isinstance(reply, Described)
        return reply.description

    def step(self, step: Step, body: Buffer) -> StepOutput:
        # A frame takes no bool for a number, as tests may.
        rows = tuple(msgspec.structs.replace(row, draws=int(row.draws)) for row in step.rows)
        step = msgspec.structs.replace(step, rows=rows)
        self._frames.send(step, body)
        reply, answer = self._answer(lambda _: None)
        match reply:
            case Nack():
                raise StepRejected(reply.code, reply.reason, reply.requests)
            case Sampled():
                return tuple(
                    drawn.token if drawn.logprobs is None else Scored(drawn.token, drawn.logprobs)
                    for drawn in reply.tokens
                )
            case Step():
                return reply.tensor, answer
        raise AssertionError(reply)

    def send_as(self, coding: Coding | None) -> None:
        self._frames.send(SendAs(coding))

    def memory(self) -> MemoryReport:
        reply, _ = self._ask(ReadMemory())
        assert isinstance(reply, Memory)
        return reply.report


@contextlib.contextmanager
def opened(
    specs: Sequence[LoadSpec], kinds: Sequence[str] = ()
) -> Iterator[list[tuple[RemoteEngine, StageInfo]]]:
    """Engines with their stages loaded, all at the same time."""
    with contextlib.ExitStack() as stack:
        kinds = kinds or ["sglang"] * len(specs)
        engines = [stack.enter_context(contextlib.closing(RemoteEngine(kind))) for kind in kinds]
        pool = stack.enter_context(ThreadPoolExecutor(len(specs)))
        infos = pool.map(lambda e, spec: e.load(spec, lambda _: None), engines, specs)
        yield list(zip(engines, infos, strict=True))
