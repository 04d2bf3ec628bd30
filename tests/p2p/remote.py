"""Networks on machines of their own: each in the loop of a thread inside a network namespace."""

import threading
from collections.abc import Awaitable, Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import trio

from pxd.p2p.libp2p_network import Libp2pNetwork
from tests.netns import Machine
from tests.p2p.nodes import ECHO, KEY, Text, echo

T = TypeVar("T")
PORT = 8471


class Remote:
    """A member on `machine`. Its methods may be called from the thread of the test."""

    def __init__(
        self, machine: Machine, directory: Path, seed: int, *join: str, relay: bool = False
    ) -> None:
        self.machine = machine
        self.network = Libp2pNetwork(
            node_seed=bytes([seed]) * 32,
            cluster_key=KEY,
            listen=("0.0.0.0", PORT),
            mdns=False,
            peers_file=directory / f"peers{seed}.json",
            join=join,
            relay=relay,
        )
        self.network.serve(ECHO, echo)
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

    def call(self, other: "Remote", text: str = "hi", timeout: float = 20.0) -> str:
        async def call() -> Text:
            return await self.network.call(other.id, ECHO, Text(text), timeout=timeout)

        return self.run(call).text

    def path(self, other: "Remote") -> str:
        """How it is connected with `other`: direct, punched, relayed, or not at all."""
        route = self.do(self.network.route_of, other.id)
        if route is None:
            return ""
        return "relayed" if route.relay else ("punched" if route.punched else "direct")

    def stop(self) -> None:
        if self._token and not self._done.done():
            self.do(self._scope.cancel)
        self._done.result(10)
        self._thread.shutdown()


@contextmanager
def members(*remotes: Callable[[], Remote]) -> Iterator[list[Remote]]:
    made: list[Remote] = []
    try:
        for make in remotes:
            made.append(make())
        yield made
    finally:
        for remote in made:
            remote.stop()
