"""The daemon's side of a worker process: spawning, pipelined commands, noticing its death.

    async with open_executor("mlx") as executor:
        info = await executor.load(spec, progress)
        executor.submit(step, body, take_result)

The context owns the process and all tasks around it. When it is left, by whatever way, the process
is killed and reaped.
"""

import logging
import math
import os
import signal
import socket
import subprocess
import sys
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager, suppress
from pathlib import Path
from types import TracebackType
from typing import Self, TypeVar

import trio

import pxd
from pxd.cluster.records import Device
from pxd.executors import scratch
from pxd.executors.backends import KINDS
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
    reply_decoder,
)
from pxd.executors.patience import Patience
from pxd.executors.protocol import (
    ExecutorDied,
    ExecutorError,
    LoadSpec,
    MemoryReport,
    ModelDescription,
    Progress,
    StageInfo,
    StepResult,
)
from pxd.wire import (
    Buffer,
    Coding,
    Copied,
    Nack,
    Sampled,
    Step,
    WireError,
    encode,
    read_frame,
    rest_of,
)

log = logging.getLogger("pxd.executors")

REPLY_TIMEOUT_S = 600.0
LOOK_EVERY_S = 1.0
EXIT_GRACE_S = 2.0
REAP_TIMEOUT_S = 10.0
READ_AHEAD = 64 << 10
STDERR_LINES = 20
STDERR_LINE_CHARACTERS = 1000

ReplyT = TypeVar("ReplyT")


class _Call:
    """A command that waits for its reply. Its caller may have gone; the reply still comes."""

    __slots__ = ("done", "progress", "reply")

    def __init__(self, progress: Progress | None) -> None:
        self.done = trio.Event()
        self.progress = progress
        self.reply: Reply | None = None

    def answer(self, reply: Reply, _body: Buffer) -> None:
        self.reply = reply
        self.done.set()

    def give_up(self, _death: str) -> None:
        self.done.set()


class _StepCall:
    """A step of so many `positions` whose result somebody waits for."""

    __slots__ = ("_take", "positions")

    progress = None

    def __init__(self, positions: int, take: Callable[[StepResult], None]) -> None:
        self.positions = positions
        self._take = take

    def answer(self, reply: Reply, body: Buffer) -> None:
        match reply:
            case Step():
                self._take((reply, body))
            case Sampled() | Nack():
                self._take(reply)
            case Failed():
                self._take(ExecutorError(reply.reason))
            case _:
                self._take(ExecutorDied("the worker answered out of turn"))

    def give_up(self, death: str) -> None:
        self._take(ExecutorDied(death))


class _LineTail:
    """Splits output into lines, logs them and keeps the last ones."""

    def __init__(self, prefix: str) -> None:
        self._prefix = prefix
        self._rest = b""
        self._lines: deque[str] = deque(maxlen=STDERR_LINES)

    def add(self, data: bytes | bytearray) -> None:
        *lines, self._rest = (self._rest + data).split(b"\n")
        if len(self._rest) > STDERR_LINE_CHARACTERS:
            lines, self._rest = [*lines, self._rest], b""
        for line in lines:
            text = line.decode(errors="replace").strip()[:STDERR_LINE_CHARACTERS]
            if text:
                self._lines.append(text)
                log.info("%s: %s", self._prefix, text)

    def finish(self) -> list[str]:
        self.add(b"\n")
        return list(self._lines)


class WorkerExecutor(AbstractAsyncContextManager["WorkerExecutor"]):
    """One worker process; see `pxd.executors.protocol.Executor` for the commands.

    Use it as an async context manager. A caller that is cancelled while it waits leaves the worker
    in order: its reply is read and dropped. Callbacks run in the executor's own task and must
    neither block nor raise. `copied` receives a word for every copy of the second KV tier.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        label: str = "executor",
        environment: Mapping[str, str] | None = None,
        directory: Path | None = None,
        reply_timeout: float = REPLY_TIMEOUT_S,
        patience: Patience | None = None,
    ) -> None:
        """`command` is run with the number of its end of the socket as a last argument.

        A worker that owes a reply and gives no sign of life for `reply_timeout` seconds is killed;
        over a step, for as long as `patience` says. `directory` is removed when the process has
        ended.
        """
        self._command = list(command)
        self._label = label
        self._environment = environment
        self._directory = directory
        self._reply_timeout = reply_timeout
        self._pending: deque[_Call | _StepCall] = deque()
        self._patience = patience or Patience()
        # When the worker began with the oldest of them, and how long it has been silent since.
        self._began, self._silence = 0.0, 0.0
        self._death: str | None = None
        self._died = trio.Event()
        self._closing = False
        self.hung = False
        self._limit = reply_timeout
        self._send_copied, self.copied = trio.open_memory_channel[Copied](math.inf)
        self._send_rest, self._rest = trio.open_memory_channel[Sequence[Buffer]](math.inf)
        self._behind = 0
        self._ahead = bytearray()
        self._nursery_manager = trio.open_nursery()

    async def __aenter__(self) -> Self:
        """Start the process. Raises `ExecutorDied` where the system does not let us."""
        try:
            self._process, stream = await self._spawn()
        except OSError as error:
            raise ExecutorDied(f"it could not be started: {error}") from error
        self.pid = self._process.pid
        self._socket = stream
        self._stream = trio.SocketStream(trio.socket.from_stdlib_socket(stream))
        self._output = _LineTail(f"{self._label} {self.pid}")
        self._nursery = await self._nursery_manager.__aenter__()
        self._nursery.start_soon(self._supervise)
        return self

    async def _spawn(self) -> tuple[trio.Process, socket.socket]:
        ours, theirs = socket.socketpair()
        try:
            with theirs:
                process = await trio.lowlevel.open_process(
                    [*self._command, str(theirs.fileno())],
                    pass_fds=[theirs.fileno()],
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    env=self._environment,
                )
        except BaseException:
            ours.close()
            raise
        return process, ours

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        await self.aclose()
        # Not given the body's exception: the nursery would wrap it in a group.
        await self._nursery_manager.__aexit__(None, None, None)

    async def aclose(self) -> None:
        """End the process and reap it; safe to call twice and under cancellation."""
        self._closing = True
        self._kill()
        with trio.CancelScope(shield=True):
            await self._died.wait()

    async def wait_died(self) -> str:
        """Wait until the process is gone, busy or idle, and return why."""
        await self._died.wait()
        return self._death or ""

    async def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        """Raises `ExecutorError`, after which another load may be tried, or `ExecutorDied`."""
        return (await self._ask(Load(spec), Loaded, progress)).info

    async def describe(self, path: Path) -> ModelDescription:
        return (await self._ask(Describe(str(path)), Described)).description

    async def measure(self) -> Device:
        return (await self._ask(Measure(), Measured)).device

    async def quantize(self, source: Path, target: Path, bits: int, progress: Progress) -> None:
        await self._ask(Quantize(str(source), str(target), bits), Quantized, progress)

    async def memory(self) -> MemoryReport:
        return (await self._ask(ReadMemory(), Memory)).report

    def submit(self, step: Step, body: Buffer, take: Callable[[StepResult], None]) -> None:
        """Have the worker run a step behind all that it was given before.

        `take` is called once, with the result, and before `wait_died` returns. Raises
        `ExecutorDied`.
        """
        self._enqueue(step, body, _StepCall(sum(row.count for row in step.rows), take))

    def send_as(self, coding: Coding | None) -> None:
        """Takes effect before every step that is submitted later. Raises `ExecutorDied`."""
        self._enqueue(SendAs(coding), b"", None)

    async def _ask(
        self, command: Command, answer: type[ReplyT], progress: Progress | None = None
    ) -> ReplyT:
        call = _Call(progress)
        self._enqueue(command, b"", call)
        await call.done.wait()
        if isinstance(call.reply, Failed):
            raise ExecutorError(call.reply.reason)
        if not isinstance(call.reply, answer):
            raise ExecutorDied(self._death or "the worker answered out of turn")
        return call.reply

    def _enqueue(self, command: Command, body: Buffer, call: _Call | _StepCall | None) -> None:
        """`call` is None for a command without a reply."""
        if self._death is not None or self._closing:
            raise ExecutorDied(self._death or "it was stopped")
        self._send([encode(command, len(body)), body])
        if call is not None:
            if not self._pending:
                self._began, self._silence = trio.current_time(), 0.0
            self._pending.append(call)

    def _send(self, parts: Sequence[Buffer]) -> None:
        """At once what the socket takes, which is all of a small frame; the rest from `_write`."""
        if not self._behind:
            # An end of the worker is for the reader to learn of.
            with suppress(OSError):
                parts = rest_of(parts, self._socket.sendmsg(parts))
        if parts:
            # Unbounded: every body in it is already held by a caller who waits for the reply.
            self._behind += 1
            self._send_rest.send_nowait(parts)

    async def _supervise(self) -> None:
        reason = ""
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._write)
                nursery.start_soon(self._read_output)
                nursery.start_soon(self._watch)
                reason = await self._read()
                with trio.move_on_after(EXIT_GRACE_S):
                    await self._process.wait()
                nursery.cancel_scope.cancel()
        finally:
            with trio.CancelScope(shield=True):
                await self._bury(reason)

    async def _read(self) -> str:
        """Hand out replies until there are no more; returns why there are no more."""
        try:
            while True:
                reply, body = await read_frame(self._read_exactly, reply_decoder)
                if isinstance(reply, Copied):
                    # Unbounded: there is at most one for each copy that was asked for.
                    self._send_copied.send_nowait(reply)
                    continue
                if not self._pending:
                    return "it sent a reply that nobody asked for"
                self._silence = 0.0
                if isinstance(reply, LoadProgress):
                    if self._pending[0].progress is not None:
                        self._pending[0].progress(reply.done)
                    continue
                self._answer(self._pending.popleft(), reply, body)
        except (EOFError, OSError):
            return ""
        except WireError as error:
            return f"it sent a frame that cannot be read: {error}"

    def _answer(self, call: _Call | _StepCall, reply: Reply, body: Buffer) -> None:
        began, self._began = self._began, trio.current_time()
        if isinstance(call, _StepCall) and isinstance(reply, (Step, Sampled)):
            self._patience.took(call.positions, self._began - began)
        call.answer(reply, body)

    async def _read_exactly(self, size: int) -> bytearray:
        """Reads ahead, so that a small frame takes one call to the system."""
        while len(self._ahead) < min(size, READ_AHEAD):
            await trio.lowlevel.wait_readable(self._socket)
            with suppress(BlockingIOError):
                more = self._socket.recv(READ_AHEAD)
                if not more:
                    raise EOFError
                self._ahead += more
        data, self._ahead = self._ahead[:size], self._ahead[size:]
        return data if len(data) == size else await self._read_large(data, size)

    async def _read_large(self, begun: bytearray, size: int) -> bytearray:
        data = bytearray(size)
        data[: len(begun)] = begun
        view, done = memoryview(data), len(begun)
        while done < size:
            count = await self._stream.socket.recv_into(view[done:])
            if count == 0:
                raise EOFError
            done += count
        return data

    async def _write(self) -> None:
        with suppress(trio.BrokenResourceError):  # the reader learns of it too
            async for parts in self._rest:
                for part in parts:
                    await self._stream.send_all(part)
                self._behind -= 1

    async def _read_output(self) -> None:
        if self._process.stdout is not None:
            async for data in self._process.stdout:
                self._output.add(data)

    async def _watch(self) -> None:
        """Kill a worker that owes a reply and has been silent for too long.

        Silence is counted in looks, not by the clock: time in which this process did not run
        either, such as a laptop's sleep, is not the worker's.
        """
        pause = min(LOOK_EVERY_S, self._reply_timeout / 4)
        while True:
            await trio.sleep(pause)
            if not self._pending:
                continue
            oldest = self._pending[0]
            self._limit = self._reply_timeout
            if isinstance(oldest, _StepCall):
                self._limit = min(self._limit, self._patience.limit(oldest.positions))
            self._silence += pause
            if self._silence >= self._limit:
                self.hung = True
                self._kill()
                return

    def _kill(self) -> None:
        if self._process.returncode is None:
            self._process.kill()

    async def _bury(self, reason: str) -> None:
        """Make sure that the process is gone, then tell everyone who waits for it."""
        self._kill()
        with trio.move_on_after(REAP_TIMEOUT_S):
            await self._process.wait()
            if self._process.stdout is not None:
                with trio.move_on_after(EXIT_GRACE_S):
                    await self._read_output()
                await self._process.stdout.aclose()
        await self._stream.aclose()
        if self._directory is not None:
            await trio.to_thread.run_sync(scratch.remove, self._directory)
        self._death = self._explain(reason)
        if self._closing:
            log.debug("%s %d: %s", self._label, self.pid, self._death)
        else:
            log.error("%s %d died: %s", self._label, self.pid, self._death)
        while self._pending:
            self._pending.popleft().give_up(self._death)
        self._died.set()

    def _explain(self, reason: str) -> str:
        if self._closing:
            return "it was stopped"
        if self.hung:
            return f"no answer for {self._limit:.3g} s, so it was killed"
        if not reason:
            reason = _exit_reason(self._process.returncode)
        lines = self._output.finish()
        return f"{reason}; its last output: {' | '.join(lines)}" if lines else reason


def _exit_reason(code: int | None) -> str:
    if code is None:
        return "it cannot be ended; the system does not let go of it"
    if code >= 0:
        return f"it ended with exit code {code}"
    name = signal.Signals(-code).name
    hint = " (out of memory?)" if -code == signal.SIGKILL else ""
    return f"it was killed by {name}{hint}"


def worker_environment() -> dict[str, str]:
    """The daemon's environment, made to find the same pxd package and never to use the network."""
    package_root = str(Path(pxd.__file__).resolve().parent.parent)
    search = [package_root, *filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))]
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(search),
        "HF_HUB_OFFLINE": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TOKENIZERS_PARALLELISM": "false",
    }


def open_executor(
    kind: str, *, scratch_root: Path | None = None, patience: Patience | None = None
) -> WorkerExecutor:
    """An executor of `kind` in a fresh process, to be entered with ``async with``.

    What it puts on disk while it lives is in `scratch_root`, or else where the system has temporary
    files. Raises `ExecutorError` for an unknown kind at once. One that is not installed shows with
    the first command.
    """
    if kind not in KINDS:
        raise ExecutorError(f"no executor kind {kind!r}; there is {', '.join(KINDS)}")
    # -P keeps the daemon's working directory out of the module search path.
    command = [sys.executable, "-P", "-X", "faulthandler", "-m", "pxd.executors.worker", kind]
    directory = scratch.name_directory(scratch_root)
    return WorkerExecutor(
        command,
        label=f"{kind} executor",
        environment={**worker_environment(), scratch.VARIABLE: str(directory)},
        directory=directory,
        patience=patience,
    )
