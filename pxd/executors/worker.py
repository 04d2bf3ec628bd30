"""The executor process: `python -m pxd.executors.worker KIND FD`.

One thread, the main one, reads commands from the socket FD, runs them on the engine and answers in
order. Tensor libraries bind arrays and streams to threads, so nothing else ever touches the engine;
copies of the second KV tier are reported from another thread.
The process lives exactly as long as the daemon holds the other end of the socket.
"""

import logging
import signal
import socket
import sys
from collections.abc import Callable
from pathlib import Path

import msgspec

from pxd.executors.backends import Backend, Quantizer, load_backend
from pxd.executors.frames import FrameSocket, exit_with_parent
from pxd.executors.messages import (
    Command,
    Describe,
    Described,
    Failed,
    Load,
    Loaded,
    LoadProgress,
    Measure,
    Measured,
    Memory,
    Quantize,
    Quantized,
    ReadMemory,
    Reply,
    SendAs,
    command_decoder,
)
from pxd.executors.protocol import Drawn, Engine, ExecutorError, Scored, StepRejected
from pxd.executors.rows import draws_of
from pxd.lean import without_torch
from pxd.wire import (
    Buffer,
    Logprobs,
    Nack,
    Sampled,
    SampledToken,
    Step,
    Tensor,
    WireError,
)

log = logging.getLogger("pxd.executors.worker")

REASON_CHARACTERS = 2000


def run_step(engine: Engine, step: Step, body: Buffer) -> tuple[Sampled | Nack | Step, Buffer]:
    """Run a step and make the frame that answers it. Never raises for what the step contains."""
    try:
        output = engine.step(step, body)
    except StepRejected as error:
        nack = Nack(
            pipeline=step.pipeline,
            session=step.session,
            step=step.step,
            code=error.code,
            reason=error.reason[:REASON_CHARACTERS],
            requests=error.requests,
        )
        return nack, b""
    if len(output) == 2 and isinstance(output[0], Tensor):
        tensor, hidden = output
        return msgspec.structs.replace(step, tensor=tensor), hidden
    tokens = tuple(
        SampledToken(request, position, *_parts(token))
        for (request, position), token in zip(draws_of(step.rows), output, strict=True)
    )
    sampled = Sampled(pipeline=step.pipeline, session=step.session, step=step.step, tokens=tokens)
    return sampled, b""


def _parts(drawn: Drawn) -> tuple[int, Logprobs | None]:
    return drawn if isinstance(drawn, Scored) else (drawn, None)


class Worker:
    """Runs commands on one backend; the engine is made at the first `Load`."""

    def __init__(self, frames: FrameSocket[Command], open_backend: Callable[[], Backend]) -> None:
        self._frames = frames
        self._open_backend = open_backend
        self._backend: Backend | None = None
        self._engine: Engine | None = None

    def run(self) -> None:
        """Serve until the daemon closes the socket. `WireError` from it means a bug: it raises."""
        while True:
            try:
                command, body = self._frames.receive()
            except EOFError:
                return
            if isinstance(command, Step):
                self._frames.send(*self._step(command, body))
            elif isinstance(command, SendAs):
                if self._engine is not None:
                    self._engine.send_as(command.coding)
            else:
                self._frames.send(self._answer(command))

    def _step(self, step: Step, body: Buffer) -> tuple[Sampled | Nack | Step, Buffer]:
        if self._engine is None:
            nack = Nack(
                pipeline=step.pipeline,
                session=step.session,
                step=step.step,
                code="not-ready",
                reason="no layers are loaded",
            )
            return nack, b""
        return run_step(self._engine, step, body)

    def _answer(self, command: Load | ReadMemory | Describe | Measure | Quantize) -> Reply:
        try:
            return self._carry_out(command)
        except ExecutorError as error:
            return Failed(str(error)[:REASON_CHARACTERS])
        except Exception as error:
            # Nothing that a model directory contains may end the process.
            log.exception("%s failed", type(command).__name__)
            return Failed(f"{type(error).__name__}: {error}"[:REASON_CHARACTERS])

    def _carry_out(self, command: Load | ReadMemory | Describe | Measure | Quantize) -> Reply:
        if self._backend is None:
            self._backend = self._open_backend()
        match command:
            case Load(spec):
                return Loaded(self._engine_of(self._backend).load(spec, self._progress))
            case ReadMemory():
                return Memory(self._engine_of(self._backend).memory())
            case Describe(path):
                return Described(self._backend.describe(Path(path)))
            case Measure():
                return Measured(self._backend.measure())
            case Quantize(source, target, bits):
                if not isinstance(self._backend, Quantizer):
                    raise ExecutorError("this executor does not quantise")
                self._backend.quantize(Path(source), Path(target), bits, self._progress)
                return Quantized()

    def _engine_of(self, backend: Backend) -> Engine:
        if self._engine is None:
            self._engine = backend.engine(self._frames.send)
        return self._engine

    def _progress(self, done: float) -> None:
        self._frames.send(LoadProgress(min(max(done, 0.0), 1.0)))


def serve(descriptor: int, open_backend: Callable[[], Backend]) -> int:
    """Be a worker on the socket `descriptor`; returns the process's exit code."""
    # Ctrl-C goes to the whole terminal group; what it means is for the daemon to decide.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    logging.basicConfig(stream=sys.stderr, level=logging.INFO, format="%(levelname)s %(message)s")
    connection = socket.socket(fileno=descriptor)
    exit_with_parent(connection)
    try:
        Worker(FrameSocket(connection, command_decoder), open_backend).run()
    except ConnectionError:
        return 0
    except WireError as error:
        log.error("the daemon sent a frame that cannot be read: %s", error)
        return 1
    return 0


def main(arguments: list[str]) -> int:
    kind, descriptor = arguments
    if kind == "mlx":
        without_torch()
    return serve(int(descriptor), lambda: load_backend(kind))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
