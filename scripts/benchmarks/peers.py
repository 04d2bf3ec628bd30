"""mlx-lm's own server: in one process, and pipelined over MLX's ring by `mlx.launch`.

Its ranks poll each other when there is nothing to do, so a peer is frozen while it is not measured.
`mlx.launch` itself polls all the time, and stays frozen: that is not what is to be compared.
"""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx

from scripts.benchmarks.load import Load, Result, put
from scripts.benchmarks.processes import Program, free_port, memory_of

LAUNCH = "mlx.launch"
BIN = Path(sys.executable).parent
ENVIRONMENT = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


class Peer:
    def __init__(self, program: Program, port: int, *, launched: bool) -> None:
        """`launched` says that the servers are children of `program`."""
        self._program = program
        self._launched = launched
        self._url = f"http://127.0.0.1:{port}"

    def wait(self) -> None:
        self._program.wait_for(self._healthy, "starting")
        self._program.freeze()

    def put(self, prompts: tuple[str, ...], tokens: int) -> Result:
        self._program.thaw(launched_only=self._launched)
        try:
            return put(Load(url=self._url, prompts=prompts, tokens=tokens))
        finally:
            self._program.freeze()

    def memory(self) -> float:
        """MiB of all its processes, what they share divided among those who share it."""
        return sum(memory_of(process).proportional for process in self._program.family())

    def _healthy(self) -> bool | None:
        try:
            return httpx.get(f"{self._url}/health", timeout=5).status_code == 200 or None
        except httpx.TransportError:
            return None


@contextmanager
def mlx_server(model: Path, root: Path) -> Iterator[Peer]:
    port = free_port()
    with _peer("mlx_lm.server", _server(model, port), root, port) as peer:
        yield peer


@contextmanager
def mlx_launch(model: Path, root: Path, ranks: int = 2) -> Iterator[Peer]:
    """`ranks` processes, each with some of the layers."""
    port = free_port()
    command = [sys.executable, str(BIN / LAUNCH), "--backend", "ring", "-n", str(ranks)]
    command += ["-p", str(_ring_port(ranks)), "--", *_server(model, port), "--pipeline"]
    with _peer(LAUNCH, command, root, port) as peer:
        yield peer


def _server(model: Path, port: int) -> list[str]:
    server = [str(BIN / "mlx_lm.server"), "--model", str(model), "--port", str(port)]
    return [*server, "--log-level", "WARNING"]


def _ring_port(ranks: int) -> int:
    # One for each rank, in a row, so not too near the end.
    while (port := free_port()) > 65535 - ranks:
        continue
    return port


@contextmanager
def _peer(name: str, command: list[str], root: Path, port: int) -> Iterator[Peer]:
    program = Program(name, command, root / f"{name}.log", environment=ENVIRONMENT)
    try:
        peer = Peer(program, port, launched=name == LAUNCH)
        peer.wait()
        yield peer
    finally:
        program.stop()
