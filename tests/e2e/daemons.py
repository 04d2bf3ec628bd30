"""Real `pxd start` processes on loopback, each with a data directory of its own."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import httpx
import psutil

from pxd.identity import Ticket
from tests.netns import Machine

DEADLINE_S = 90.0
Status = dict[str, Any]


def wait_for(condition: Callable[[], Any], what: str, deadline_s: float = DEADLINE_S) -> Any:
    """Poll until `condition` returns something true; return that."""
    deadline = time.monotonic() + deadline_s
    while True:
        found = condition()
        if found:
            return found
        if time.monotonic() > deadline:
            raise AssertionError(f"not within {deadline_s:g} s: {what}")
        time.sleep(0.05)


class Daemon:
    # The machine is the same for all of them, so only the first one measures it.
    _hardware: ClassVar[bytes] = b""

    def __init__(
        self,
        root: Path,
        name: str,
        *options: str,
        join: str | None = None,
        slower: int = 1,
        machine: Machine | None = None,
        environment: Mapping[str, str] | None = None,
    ) -> None:
        """`slower` than the first one by that factor, as far as the planner knows.

        On a `machine` of its own it has the ports it likes best and mDNS, else neither.
        """
        self.name = name
        self.machine = machine
        self._environment = {**os.environ, **(environment or {})}
        self.data_dir = root / name
        self.log_path = root / f"{name}.log"
        # What answers are compared with is computed by MLX.
        options = ("--executor", "mlx", *options)
        shared = ("--no-mdns", "--listen", "127.0.0.1:0", "--http", "127.0.0.1:0")
        self._command = self._pxd("start", "--name", name, *(() if machine else shared), *options)
        if join:
            self._command += ["--join", join]
        self.data_dir.mkdir(parents=True)
        if Daemon._hardware:
            measured = json.loads(Daemon._hardware)
            for figure in ("tflops", "bandwidth"):
                measured["figures"][figure] /= slower
            (self.data_dir / "hardware.json").write_text(json.dumps(measured))
        self.start()

    def _pxd(self, *arguments: str) -> list[str]:
        command = [sys.executable, "-m", "pxd", *arguments, "--data-dir", str(self.data_dir)]
        return self.machine.command(*command) if self.machine else command

    def _http(self, function: Callable[..., httpx.Response], path: str, **more: Any) -> Any:
        # Without certificates, which take longer to read than most calls take.
        call = partial(function, f"{self.url}{path}", verify=False, **more)
        return self.machine.call(call) if self.machine else call()

    def start(self) -> None:
        with self.log_path.open("ab") as log:
            self.process = subprocess.Popen(
                self._command,
                stdout=log,
                stderr=log,
                stdin=subprocess.DEVNULL,
                env=self._environment,
            )

    def join(self, ticket: str) -> None:
        """Start again with another ticket than before."""
        if "--join" in self._command:
            del self._command[self._command.index("--join") :]
        self._command += ["--join", ticket]
        self.start()

    def keep_port(self) -> None:
        """Listen where it listens now after the next start, too, as daemons with defaults do."""
        [port] = re.findall(r"/tcp/(\d+)", Ticket.parse(self.ticket()).addresses[0])
        self._command[self._command.index("--listen") + 1] = f"127.0.0.1:{port}"

    @property
    def log(self) -> str:
        return self.log_path.read_text(errors="replace")

    @property
    def url(self) -> str:
        def read() -> str | None:
            if self.process.poll() is not None:
                raise AssertionError(f"{self.name} ended: {self.log[-3000:]}")
            try:
                content = json.loads((self.data_dir / "daemon.json").read_text())
            except FileNotFoundError:
                return None
            Daemon._hardware = Daemon._hardware or (self.data_dir / "hardware.json").read_bytes()
            return content["http"] if content["pid"] == self.process.pid else None

        return wait_for(read, f"{self.name} is up")

    def status(self) -> Status:
        return self._http(httpx.get, "/cluster/status", timeout=10).raise_for_status().json()

    @property
    def id(self) -> str:
        return self.status()["self"]

    def wait_status(self, condition: Callable[[Status], Any], what: str) -> Status:
        last: Status = {}

        def check() -> bool:
            nonlocal last
            last = self.status()
            return bool(condition(last))

        try:
            wait_for(check, what)
        except AssertionError as error:
            shown = json.dumps(last, indent=1)
            raise AssertionError(f"{error}\n{shown}\n{self.log[-5000:]}") from error
        return last

    def pxd(self, *arguments: str) -> "subprocess.CompletedProcess[str]":
        command = self._pxd(*arguments)
        return subprocess.run(command, capture_output=True, text=True, timeout=60)

    def ticket(self) -> str:
        assert self.url
        done = self.pxd("ticket")
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    def chat(self, text: str, **options: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": text}], "temperature": 0, **options}
        return self._http(httpx.post, "/v1/chat/completions", json=body, timeout=120)

    def answer(self, text: str, **options: Any) -> str:
        response = self.chat(text, **options)
        assert response.status_code == 200, response.text
        return response.json()["choices"][0]["message"]["content"]

    def executors(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def end(self) -> None:
        if self.process.poll() is None:
            children = self.executors()
            self.process.kill()
            self.process.wait()
            psutil.wait_procs(children, timeout=20)


def pipelines(status: Status) -> list[list[dict[str, Any]]]:
    """The pipelines of the model that is served; each is a list of stages."""
    for model in status["models"]:
        if model["state"] == "serving":
            return model["pipelines"]
    return []


def own_stages(status: Status) -> list[tuple[int, int]]:
    """The ranges of the served pipeline, in order."""
    return [(stage["start"], stage["end"]) for line in pipelines(status)[:1] for stage in line]


def serving_on(count: int) -> Callable[[Status], bool]:
    """One pipeline alone, over `count` nodes."""
    return lambda status: [len(line) for line in pipelines(status)] == [count]


def all_hold(count: int) -> Callable[[Status], bool]:
    """The model is served and each of `count` nodes holds something, be it as a spare."""

    def check(status: Status) -> bool:
        alive = [node["stages"] for node in status["nodes"] if node["state"] == "alive"]
        ready = [stages and all(stage["state"] == "ready" for stage in stages) for stages in alive]
        lines = pipelines(status)
        states = {stage["state"] for line in lines for stage in line}
        return bool(lines) and states == {"ready"} and ready == [True] * count

    return check


@contextmanager
def cluster(
    root: Path,
    names: Sequence[str],
    *options: str,
    serving: bool = True,
    ready: Callable[[Status], bool] | None = None,
) -> Iterator[list[Daemon]]:
    """Daemons that know each other.

    With `serving` all see it `ready`, which unless given is one pipeline over all of them.
    """
    daemons: list[Daemon] = []
    try:
        daemons.append(Daemon(root, names[0], *options))
        if len(names) > 1:
            ticket = daemons[0].ticket()
            daemons += [Daemon(root, name, *options, join=ticket) for name in names[1:]]
        for daemon in daemons:
            if serving:
                condition = ready or serving_on(len(names))
                daemon.wait_status(condition, f"served by {len(names)} nodes")
        yield daemons
    finally:
        for daemon in daemons:
            daemon.end()
        if sys.exc_info()[0] is not None and not os.environ.get("PXD_TEST_QUIET"):
            for daemon in daemons:
                print(f"----- log of {daemon.name}\n{daemon.log[-4000:]}")
