"""A program that serves while it is measured, and goes with all its children afterwards."""

import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import psutil

from scripts.benchmarks.errors import BenchError

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 15.0
POLL_S = 0.05

FoundT = TypeVar("FoundT")


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@dataclass(frozen=True)
class Memory:
    """MiB of one process: resident, and with what it shares divided among those who share it."""

    resident: float
    proportional: float


def memory_of(process: psutil.Process) -> Memory:
    found = process.memory_full_info()
    # Only Linux tells of shares.
    return Memory(found.rss / 2**20, getattr(found, "pss", found.uss) / 2**20)


class Program:
    """A process group of its own, whose output goes to a file."""

    def __init__(
        self,
        name: str,
        command: Sequence[str],
        log: Path,
        *,
        environment: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self.name = name
        self._log = log
        with log.open("wb") as output:
            self._process = subprocess.Popen(
                command,
                stdout=output,
                stderr=output,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
                env={**os.environ, **(environment or {})},
                pass_fds=pass_fds,
            )
        self.pid = self._process.pid

    def wait_for(self, find: Callable[[], FoundT | None], what: str) -> FoundT:
        """Poll until `find` returns something. Raises `BenchError` if the program ends before."""
        deadline = time.monotonic() + START_TIMEOUT_S
        while (found := find()) is None:
            if self._process.poll() is not None:
                raise BenchError(f"{self.name} ended by itself:\n{self.tail()}")
            if time.monotonic() > deadline:
                raise BenchError(f"{self.name}: {what} took too long:\n{self.tail()}")
            time.sleep(POLL_S)
        return found

    def tail(self) -> str:
        return "\n".join(self._log.read_text(errors="replace").splitlines()[-15:])

    def family(self) -> list[psutil.Process]:
        """The process and all its children."""
        try:
            own = psutil.Process(self.pid)
            return [own, *own.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def send(self, number: signal.Signals) -> None:
        """Signal the process alone, not its children."""
        if self.running:
            self._process.send_signal(number)

    def stop(self) -> None:
        """Ask it to end, then make it; frozen or not."""
        family = self.family()
        for number in (signal.SIGTERM, signal.SIGCONT):
            self._signal(family[:1], number)
        try:
            self._process.wait(STOP_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._signal(family, signal.SIGKILL)
        psutil.wait_procs(family, timeout=STOP_TIMEOUT_S)

    def freeze(self) -> None:
        """Take no processor time until `thaw`."""
        self._signal(self.family(), signal.SIGSTOP)

    def thaw(self, *, launched_only: bool = False) -> None:
        """Go on; with `launched_only` just what the program has started, and not itself."""
        self._signal(self.family()[launched_only:], signal.SIGCONT)

    @staticmethod
    def _signal(processes: Sequence[psutil.Process], number: signal.Signals) -> None:
        for process in processes:
            try:
                process.send_signal(number)
            except psutil.NoSuchProcess:
                continue
