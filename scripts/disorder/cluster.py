"""Real daemons that are started, killed, frozen and started again."""

import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import trio

from scripts.benchmarks.bench import say
from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.processes import Program
from scripts.disorder.ground import Spot

PXD = (sys.executable, "-m", "pxd")
NAMES = ("ann", "bob", "cat", "dan", "eve", "fay")
MARK = "PXD_CHAOS"
"""An environment variable that daemons hand on to whatever they start."""

START_S = 90.0
END_S = 60.0
COMMAND_S = 60.0
POLL_S = 0.1
STATUS_S = 5.0

Status = dict[str, Any]


class Node:
    """One place for a daemon, which has one life after another.

    `answers` while clients may expect it to, `frozen` the times in which it could not: trio's
    seconds, the last end infinite while it goes on.
    """

    def __init__(self, name: str, root: Path, spot: Spot, options: Sequence[str]) -> None:
        self.name = name
        self.spot = spot
        self.lives = 0
        self.answers = False
        self.frozen: list[tuple[float, float]] = []
        self.id = ""
        self._root = root
        self._options = options
        self._program: Program | None = None

    @property
    def program(self) -> Program:
        if self._program is None:
            raise BenchError(f"{self.name} was never started")
        return self._program

    def launch(self, join: str = "") -> None:
        self.lives += 1
        # What answers are compared with is computed by MLX.
        command = [*self.spot.prefix, *PXD, "start", "--name", self.name, "--executor", "mlx"]
        command += ["--data-dir", str(self.spot.data_dir)]
        command += ["--http", self.spot.http, "--listen", self.spot.listen, *self._options]
        environment = {MARK: str(self._root)} | ({"PXD_JOIN": join} if join else {})
        log = self._root / f"{self.name}.{self.lives}.log"
        self._program = Program(self.name, command, log, environment=environment)

    async def start(self, join: str = "") -> None:
        """Launch it and wait until it answers. Raises `BenchError` if it does not."""
        self.launch(join)
        await until(self._up, f"{self.name} answers", START_S, self.program)
        self.answers = True

    async def _up(self) -> bool:
        status = await self.status()
        self.id = status["self"] if status else self.id
        return status is not None

    async def status(self) -> Status | None:
        """What it says of the cluster; None if it says nothing."""
        try:
            # Certificates, which plain HTTP has none of, would take longer to read than this.
            async with httpx.AsyncClient(timeout=STATUS_S, verify=False) as client:
                response = await client.get(f"http://{self.spot.http}/cluster/status")
        except httpx.TransportError:
            return None
        found: Status = response.raise_for_status().json()
        return found

    async def command(self, *arguments: str) -> str:
        """What a pxd command against this node prints. Raises `BenchError` with what it says."""
        command = [*self.spot.prefix, *PXD, *arguments, "--data-dir", str(self.spot.data_dir)]
        with trio.move_on_after(COMMAND_S):
            done = await trio.run_process(
                command, capture_stdout=True, capture_stderr=True, check=False
            )
            if done.returncode:
                raise BenchError(done.stderr.decode(errors="replace").strip())
            return done.stdout.decode().strip()
        raise BenchError(f"`pxd {' '.join(arguments)}` does not end")

    def kill(self) -> None:
        self.answers = False
        self.program.send(signal.SIGKILL)

    async def leave(self) -> None:
        """Ask the daemon to end; returns when it has. Raises `BenchError` if it does not."""
        self.answers = False
        self.program.send(signal.SIGTERM)
        await until(self._ended, f"{self.name} ends after SIGTERM", END_S)

    async def _ended(self) -> bool:
        return not self.program.running

    def freeze(self) -> None:
        self.frozen.append((trio.current_time(), float("inf")))
        self.program.send(signal.SIGSTOP)

    def thaw(self) -> None:
        self.program.send(signal.SIGCONT)
        self.frozen[-1] = (self.frozen[-1][0], trio.current_time())

    @property
    def is_frozen(self) -> bool:
        return bool(self.frozen) and self.frozen[-1][1] == float("inf")

    def was_frozen(self, since: float, until: float) -> bool:
        return any(begin < until and since < end for begin, end in self.frozen)

    def executors(self) -> list[psutil.Process]:
        """The oldest first."""
        return sorted(self.program.family()[1:], key=lambda process: process.pid)

    @property
    def logs(self) -> list[Path]:
        return [self._root / f"{self.name}.{life}.log" for life in range(1, self.lives + 1)]


async def until(
    condition: Callable[[], Any], what: str, seconds: float, program: Program | None = None
) -> None:
    """Poll. Raises `BenchError` when the time is over, or when the `program` ends before."""
    with trio.move_on_after(seconds):
        while not await condition():
            if program is not None and not program.running:
                raise BenchError(f"{program.name} ended by itself:\n{program.tail()}")
            await trio.sleep(POLL_S)
        return
    raise BenchError(f"not within {seconds:g} s: {what}")


class Cluster:
    """`fallen` says which daemons ended though nobody had ended them."""

    def __init__(
        self,
        root: Path,
        spots: Sequence[Spot],
        capacities: Sequence[int],
        options: Sequence[str] = (),
    ) -> None:
        self.root = root
        self.nodes = [
            Node(name, root, spot, ["--max-layers", str(most), *options])
            for name, spot, most in zip(NAMES, spots, capacities, strict=False)
        ]
        self.fallen: list[str] = []

    async def start(self) -> None:
        first, *others = self.nodes
        await first.start()
        # The machine is the same for all of them, so only the first one measures it.
        hardware = (first.spot.data_dir / "hardware.json").read_bytes()
        ticket = await first.command("ticket")
        async with trio.open_nursery() as nursery:
            for node in others:
                (node.spot.data_dir / "hardware.json").write_bytes(hardware)
                nursery.start_soon(node.start, ticket)

    async def watch(self) -> None:
        """Have daemons that end by themselves on record, and start them again."""
        while True:
            await trio.sleep(POLL_S)
            for node in self.nodes:
                if node.answers and not node.program.running:
                    node.answers = False
                    self.fallen.append(f"{node.name} ended by itself:\n{node.program.tail()}")
                    say(f"    {self.fallen[-1]}")
                    try:
                        await node.start()
                    except BenchError as error:
                        self.fallen.append(str(error))

    async def settle(self, seconds: float) -> str:
        """Wait until all see each other and serve; returns what is amiss at the end."""
        amiss = ""
        with trio.move_on_after(seconds):
            while amiss := await self._amiss():
                await trio.sleep(POLL_S)
        return amiss

    async def _amiss(self) -> str:
        for node in self.nodes:
            status = await node.status()
            if status is None:
                return f"{node.name} does not answer"
            if found := self._unsettled(status):
                return f"{node.name} says: {found}"
        return ""

    def _unsettled(self, status: Status) -> str:
        alive = {node["id"]: node for node in status["nodes"] if node["state"] == "alive"}
        missing = [node.name for node in self.nodes if node.id not in alive]
        if missing or len(status["nodes"]) != len(self.nodes):
            return f"{len(status['nodes'])} nodes known, {', '.join(missing) or 'none'} not alive"
        for node in alive.values():
            states = {stage["state"] for stage in node["stages"]}
            if states != {"ready"}:
                return f"{node['name']} has stages {', '.join(sorted(states)) or 'none'}"
        models = [(model["name"], model["state"]) for model in status["models"]]
        return "" if models == [("demo", "serving")] else f"models are {models}"

    @property
    def awake(self) -> list[Node]:
        return [node for node in self.nodes if node.answers and not node.is_frozen]

    async def status(self) -> Status | None:
        """What the first says that says anything."""
        for node in self.awake:
            if status := await node.status():
                return status
        return None

    async def roles(self, node: Node) -> str:
        """What the node is to the cluster, in words; empty if it is nothing or nobody says."""
        status = await self.status()
        if status is None:
            return ""
        found = ["leader"] if status["leader"] == node.id else []
        for model in status["models"]:
            for number, line in enumerate(model["pipelines"], 1):
                places = [place for place, stage in enumerate(line) if stage["node"] == node.id]
                found += [_part(place, len(line)) + f" of {number}" for place in places]
        return ", ".join(found)

    def stop(self) -> None:
        started = [node for node in self.nodes if node.lives]
        for node in started:
            # All at once: none of them has to take over from another.
            node.program.send(signal.SIGTERM)
        for node in started:
            node.program.stop()

    def recoveries(self) -> int:
        """How many times a request went on after a failure, as the daemons' logs tell."""
        words = "goes on after a failure"
        logs = [log for node in self.nodes for log in node.logs]
        return sum(log.read_text(errors="replace").count(words) for log in logs)


def _part(place: int, stages: int) -> str:
    if stages == 1:
        return "all"
    return "head" if place == 0 else "tail" if place == stages - 1 else "middle"
