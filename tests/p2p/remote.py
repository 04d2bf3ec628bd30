"""Members on machines of their own, inside network namespaces.

`Remote` runs in a thread, so that a test can look inside; `RelayProcess` can be killed. As a
program this is the relay; arguments: a directory, a seed.
"""

import subprocess
import sys
import threading
from collections.abc import Awaitable, Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TypeVar

import trio

from pxd.p2p.host import Route
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.secure import Identity
from tests.netns import Machine
from tests.p2p.nodes import ECHO, KEY, Text, echo

T = TypeVar("T")
PORT = 8471


class Remote:
    """A member on `machine`. Its methods may be called from the thread of the test."""

    def __init__(self, machine: Machine, directory: Path, seed: int, *join: str) -> None:
        self.machine = machine
        self.network = network(directory, seed, *join)
        self.id = self.network.peer_id
        self.address = f"/ip4/{machine.ip}/tcp/{PORT}/p2p/{self.id}"
        self._token: trio.lowlevel.TrioToken | None = None
        self._scope = trio.CancelScope()
        self._up = threading.Event()
        self._thread = ThreadPoolExecutor(1, initializer=machine.enter)
        self._done: Future[None] = self._thread.submit(trio.run, self._main)
        assert self._up.wait(10), "it does not start"

    async def _main(self) -> None:
        async with trio.open_nursery() as nursery:
            with self._scope:
                await nursery.start(self.network.run)
                self._token = trio.lowlevel.current_trio_token()
                self._up.set()
                await trio.sleep_forever()
            nursery.cancel_scope.cancel()

    def run(self, function: Callable[..., Awaitable[T]], *arguments: object) -> T:
        return trio.from_thread.run(function, *arguments, trio_token=self._token)

    def do(self, function: Callable[..., T], *arguments: object) -> T:
        return trio.from_thread.run_sync(function, *arguments, trio_token=self._token)

    def call(self, other: "Remote | RelayProcess", text: str = "hi", timeout: float = 20.0) -> str:
        async def call() -> Text:
            return await self.network.call(other.id, ECHO, Text(text), timeout=timeout)

        return self.run(call).text

    def route(self, other: "Remote") -> Route | None:
        return self.do(self.network.route_of, other.id)

    def path(self, other: "Remote") -> str:
        route = self.route(other)
        return route.path if route else ""

    def stop(self) -> None:
        if self._token and not self._done.done():
            self.do(self._scope.cancel)
        self._done.result(10)
        self._thread.shutdown()


class RelayProcess:
    """A relay on `machine`."""

    def __init__(self, machine: Machine, directory: Path, seed: int) -> None:
        self.id = Identity(bytes([seed]) * 32).peer_id
        self.address = f"/ip4/{machine.ip}/tcp/{PORT}/p2p/{self.id}"
        command = [sys.executable, "-m", "tests.p2p.remote", str(directory), str(seed)]
        self._process = subprocess.Popen(machine.command(*command), stdout=subprocess.PIPE)
        assert self._process.stdout
        with self._process.stdout as output:
            assert output.readline() == b"up\n"

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def network(directory: Path, seed: int, *join: str, relay: bool = False) -> Libp2pNetwork:
    made = Libp2pNetwork(
        node_seed=bytes([seed]) * 32,
        cluster_key=KEY,
        listen=("0.0.0.0", PORT),
        mdns=False,
        peers_file=directory / f"peers{seed}.json",
        join=join,
        relay=relay,
    )
    made.serve(ECHO, echo)
    return made


async def _relay(directory: str, seed: str) -> None:
    async with trio.open_nursery() as nursery:
        await nursery.start(network(Path(directory), int(seed), relay=True).run)
        print("up", flush=True)


if __name__ == "__main__":
    trio.run(_relay, *sys.argv[1:])
