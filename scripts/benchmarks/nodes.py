"""pxd daemons on this machine, each with a data directory and ports of its own."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, ClassVar

import httpx
import msgspec

from scripts.benchmarks import load as load_module
from scripts.benchmarks.delay import Host, Switch
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.load import Load, Result, put
from scripts.benchmarks.processes import Memory, Program, memory_of

PXD = ("-m", "pxd")
ONE_STEP_AT_A_TIME = ("-m", "scripts.benchmarks.one_step")
"""Starts pxd without micro-batches."""


class Node:
    """One `pxd start`."""

    # The machine is the same for all of them, so only the first one measures it.
    _hardware: ClassVar[bytes] = b""

    def __init__(
        self, root: Path, name: str, options: Sequence[str], *, join: str = "",
        launcher: Sequence[str] = PXD, host: Host | None = None,
    ) -> None:  # fmt: skip
        """On `host` instead of this machine's own loopback, where that is given."""
        self.data_dir = root / name
        self.data_dir.mkdir(parents=True)
        if Node._hardware:
            (self.data_dir / "hardware.json").write_bytes(Node._hardware)
        command = [*(host.prefix if host else ()), sys.executable, *launcher, "start"]
        command += ["--name", name, "--no-mdns", "--data-dir", str(self.data_dir), *options]
        # As the peers do.
        command += ["--executor", "mlx"]
        command += ["--leave-timeout", "0", "--http", "127.0.0.1:0", "--listen"]
        command += [f"{host.address}:8471" if host else "127.0.0.1:0"]
        self.program = Program(
            name,
            command,
            root / f"{name}.log",
            environment={"PXD_JOIN": join} if join else None,
            pass_fds=host.pass_fds if host else (),
        )
        self._enter = host.attach(self.program) if host else ()

    def url(self) -> str:
        return self.program.wait_for(self._url, "starting")

    def _url(self) -> str | None:
        try:
            content = json.loads((self.data_dir / "daemon.json").read_text())
            Node._hardware = Node._hardware or (self.data_dir / "hardware.json").read_bytes()
        except (FileNotFoundError, json.JSONDecodeError):
            return None
        url: str = content["http"]
        return url

    def status(self) -> dict[str, Any]:
        url = self.url()
        found: dict[str, Any]
        if self._enter:
            found = json.loads(self.command("status", "--json"))
        else:
            found = httpx.get(f"{url}/cluster/status", timeout=30).json()
        return found

    def command(self, *arguments: str) -> str:
        """What a pxd command against this node prints."""
        return self._run(*PXD, *arguments, "--data-dir", str(self.data_dir))

    def put(self, prompts: tuple[str, ...], tokens: int) -> Result:
        load = Load(url=self.url(), prompts=prompts, tokens=tokens)
        if not self._enter:
            return put(load)
        encoded = msgspec.json.encode(load).decode()
        return msgspec.json.decode(self._run("-m", load_module.__name__, encoded), type=Result)

    def _run(self, *arguments: str) -> str:
        command = [*self._enter, sys.executable, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, timeout=900, check=False)
        if done.returncode:
            raise BenchError(f"{' '.join(arguments)[:80]}: {done.stderr.strip()}")
        return done.stdout.strip()

    def memory(self) -> tuple[Memory, Memory]:
        """Of the daemon and of its executors."""
        daemon, *executors = self.program.family()
        parts = [memory_of(process) for process in executors]
        resident = sum(part.resident for part in parts)
        return memory_of(daemon), Memory(resident, sum(part.proportional for part in parts))


class Cluster:
    """Nodes that serve one model as one pipeline."""

    def __init__(self, nodes: Sequence[Node]) -> None:
        self.nodes = list(nodes)
        self.stages: list[tuple[int, int]] = []

    def wait(self) -> None:
        """Until all nodes say that all of them together serve the model."""
        for node in self.nodes:
            stages = node.program.wait_for(lambda node=node: self._served(node), "serving")  # type: ignore[misc]
            self.stages = [(stage["start"], stage["end"]) for stage in stages]
        self._asked = self._head()

    def put(self, prompts: tuple[str, ...], tokens: int) -> Result:
        """Ask the node with the head."""
        return self._asked.put(prompts, tokens)

    def _served(self, node: Node) -> list[dict[str, Any]] | None:
        pipeline = _pipeline(node.status())
        complete = len(pipeline) == len(self.nodes)
        return pipeline if complete and all(s["state"] == "ready" for s in pipeline) else None

    def _head(self) -> Node:
        """The node with the first stage."""
        wanted = _pipeline(self.nodes[0].status())[0]["node"]
        return next(node for node in self.nodes if node.status()["self"] == wanted)


def _pipeline(status: dict[str, Any]) -> list[dict[str, Any]]:
    for model in status["models"]:
        if model["state"] == "serving" and len(model["pipelines"]) == 1:
            stages: list[dict[str, Any]] = model["pipelines"][0]
            return stages
    return []


def split_options(model: Path, layers: int, nodes: int) -> list[str]:
    """Have a model served by just so many nodes: together they may, one fewer could not."""
    options = ["--model", str(model)]
    if nodes > 1:
        options += ["--max-layers", str((layers - 1) // (nodes - 1))]
    return options


@contextmanager
def cluster(
    root: Path, model: Path, layers: int, count: int, *,
    options: Sequence[str] = (), launcher: Sequence[str] = PXD, links: Switch | None = None,
) -> Iterator[Cluster]:  # fmt: skip
    """`count` daemons that serve `model` together, on loopback or joined by `links`.

    `root` must not exist.
    """
    with ExitStack() as stack:
        nodes: list[Node] = []
        ticket = ""
        for place in range(count):
            settings = [*split_options(model, layers, count), *options]
            host = Host(links) if links else None
            node = Node(root, f"node{place}", settings, join=ticket, launcher=launcher, host=host)
            stack.callback(node.program.stop)
            nodes.append(node)
            if place == 0:
                node.url()
                ticket = node.command("ticket") if count > 1 else ""
        found = Cluster(nodes)
        found.wait()
        yield found


def start_options() -> str:
    """The help of `pxd start`, to see what this release offers."""
    command = [sys.executable, *PXD, "start", "--help"]
    environment = {**os.environ, "COLUMNS": "200"}
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return done.stdout
