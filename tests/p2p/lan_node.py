"""A node without a model in a process of its own: network and gossip, found by multicast alone.

Arguments: a directory, a byte for the identity, a cluster key in hex. Tells what it sees, as JSON,
one line whenever it is another. `bandwidth` in GB/s, as measured from here.
"""

import contextlib
import json
import logging
import sys
import time
from pathlib import Path

import trio

from pxd import wire
from pxd.cluster.members import MemberEvent
from pxd.cluster.records import NodeRecord
from pxd.p2p.bandwidth import Interrupted, Meter
from pxd.p2p.gossip import Gossip, GossipEvent
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.network import NetworkError
from pxd.p2p.signatures import NodeSigner


async def _persist(incarnation: int, term: int) -> None:
    await trio.lowlevel.checkpoint()


class LanNode:
    def __init__(self, directory: Path, seed: bytes, key: bytes) -> None:
        directory.mkdir(exist_ok=True)
        self.network = Libp2pNetwork(
            node_seed=seed,
            cluster_key=key,
            listen=("*", 8471),
            mdns=True,
            peers_file=directory / "peers.json",
        )
        own = self.network.peer_id
        record = NodeRecord(id=own, name=directory.name, incarnation=1, started=time.time())
        self.gossip = Gossip(
            self.network,
            record,
            signer=NodeSigner(seed),
            seed=seed[0],
            term=0,
            expects_peers=False,
            persist=_persist,
        )
        self.gossip.on_event(self._on_event)
        self.deaths = 0
        self.bandwidths: dict[str, float] = {}
        self.meter = Meter(self.network, lambda: False)
        self.network.on_frame(self._on_frame)

    async def _on_frame(self, peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        if isinstance(frame, wire.Filler):
            self.meter.arrived(peer, frame)

    def _on_event(self, event: GossipEvent) -> None:
        if isinstance(event, MemberEvent) and event.kind == "died":
            self.deaths += 1

    async def run(self) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self.network.run)
            self.gossip.update(addresses=self.network.addresses())
            await nursery.start(self.gossip.run)
            nursery.start_soon(self._follow)
            nursery.start_soon(self._tell)
            nursery.start_soon(self._measure)

    async def _measure(self) -> None:
        """Everybody, once; over and over until it works."""
        while True:
            await trio.sleep(0.2)
            for peer in self.network.peers() & self.gossip.members.keys():
                name = self.gossip.members[peer].record.name
                if name not in self.bandwidths:
                    with contextlib.suppress(NetworkError, Interrupted):
                        self.bandwidths[name] = await self.meter.measure(peer)

    async def _follow(self) -> None:
        while True:
            await self.network.wait_moved()
            self.gossip.update(addresses=self.network.addresses())

    async def _tell(self) -> None:
        told: dict[str, object] = {}
        while True:
            seen = self.seen()
            if seen != told:
                print(json.dumps(seen), flush=True)
                told = seen
            await trio.sleep(0.05)

    def seen(self) -> dict[str, object]:
        members = self.gossip.members.values()
        return {
            "states": {member.record.name: member.state for member in members},
            "addresses": {member.record.name: member.record.addresses for member in members},
            "hosts": {m.record.name: self.network.host_of(m.record.id) for m in members},
            "deaths": self.deaths,
            "bandwidths": self.bandwidths.copy(),
        }


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    logging.getLogger("zeroconf").setLevel(logging.ERROR)
    directory, number, key = sys.argv[1:]
    trio.run(LanNode(Path(directory), bytes([int(number)]) * 32, bytes.fromhex(key)).run)
