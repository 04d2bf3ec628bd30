"""Real networks on loopback, all in the loop of the test."""

import itertools
from collections.abc import Callable
from pathlib import Path

import msgspec
import trio

from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.network import Method

KEY = b"k" * 32


class Text(msgspec.Struct):
    text: str


ECHO = Method("test.echo", Text, Text)
NOTE: Method[Text, None] = Method("test.note", Text, type(None))


async def echo(peer: str, request: Text) -> Text:
    return request


async def eventually(condition: Callable[[], bool], within: float = 15.0) -> None:
    """Wait for something that no event tells of; fails the test when it does not come true."""
    with trio.fail_after(within):
        while not condition():
            await trio.sleep(0.01)


class Nodes:
    """Starts networks on loopback; each can be stopped alone."""

    def __init__(self, nursery: trio.Nursery, directory: Path) -> None:
        self._nursery = nursery
        self._directory = directory
        self._seeds = itertools.count(1)
        self._scopes: dict[str, trio.CancelScope] = {}
        self._stopped: dict[str, trio.Event] = {}

    def make(
        self,
        *join: Libp2pNetwork | str,
        seed: int | None = None,
        key: bytes = KEY,
        port: int = 0,
        mdns: bool = False,
        direct: bool = True,
        relay: bool = False,
    ) -> Libp2pNetwork:
        seed = next(self._seeds) if seed is None else seed
        network = Libp2pNetwork(
            node_seed=bytes([seed]) * 32,
            cluster_key=key,
            listen=("127.0.0.1", port),
            mdns=mdns,
            peers_file=self._directory / f"peers{seed}.json",
            join=tuple(
                address
                for member in join
                for address in ((member,) if isinstance(member, str) else member.addresses())
            ),
            direct_channels=direct,
            relay=relay,
        )
        network.serve(ECHO, echo)
        return network

    async def run(self, network: Libp2pNetwork) -> Libp2pNetwork:
        await self._nursery.start(self._run, network)
        return network

    async def start(self, *join: Libp2pNetwork | str, **options: object) -> Libp2pNetwork:
        """Make and run; with members to join, wait until connected with them."""
        network = await self.run(self.make(*join, **options))  # type: ignore[arg-type]
        for member in join:
            if isinstance(member, Libp2pNetwork):
                await connected(network, member)
        return network

    async def stop(self, network: Libp2pNetwork) -> None:
        self._scopes[network.peer_id].cancel()
        await self._stopped[network.peer_id].wait()

    async def _run(
        self, network: Libp2pNetwork, *, task_status: trio.TaskStatus = trio.TASK_STATUS_IGNORED
    ) -> None:
        stopped = self._stopped[network.peer_id] = trio.Event()
        with trio.CancelScope() as scope:
            self._scopes[network.peer_id] = scope
            await network.run(task_status=task_status)
        stopped.set()


async def connected(a: Libp2pNetwork, b: Libp2pNetwork) -> None:
    await eventually(lambda: b.peer_id in a.peers() and a.peer_id in b.peers())
