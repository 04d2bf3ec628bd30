"""A member that has gone bad: holds the key and sends records of the largest size without end.

Run as a program: python -m tests.e2e.flooder TICKET DIRECTORY; says "flooding" once it does.
"""

import secrets
import sys
import time
from pathlib import Path

import msgspec
import trio

from pxd.cluster.messages import MAX_RECORD, Delta, News
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import seal
from pxd.identity import Ticket
from pxd.p2p import rpc
from pxd.p2p.gossip import GOSSIP
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.signatures import NodeSigner

BATCH = 20


def largest(identity: str, version: int) -> NodeRecord:
    """As large as a record may be, and different every time."""
    pad = "".join(chr(0x4E00 + secrets.randbelow(20000)) for _ in range(1000))
    # Names that nobody shall look up, names that are none, and places where nobody listens.
    hosts = ("dns4/" + ".".join(["a" * 59] * 4), "dns4/" + "a" * 240, "ip4/127.0.9.9")
    addresses = tuple(f"/{hosts[n % 3]}/tcp/{1 + n}/p2p/{identity}" for n in range(16))
    record = NodeRecord(
        id=identity,
        name="flooder",
        incarnation=1,
        version=version,
        addresses=addresses,
        problem=pad,
        started=time.time(),
    )
    assert len(msgspec.msgpack.encode(record)) < MAX_RECORD
    return record


async def flood(network: Libp2pNetwork, seed: bytes, victim: str) -> None:
    session = network._sessions.get(victim)
    if session is None:
        return
    signer = NodeSigner(seed)
    version = int(time.time() * 1000)
    # Strangers that do not exist, each with a key of its own, next to the own record.
    while True:
        stream = await session.connection.open_stream(rpc.PROTOCOL)
        try:
            while True:
                records = [seal(largest(network.peer_id, version), signer)]
                for _ in range(3):
                    other = Libp2pNetwork(
                        node_seed=(fake := secrets.token_bytes(32)),
                        cluster_key=bytes(32),
                        listen=("127.0.0.1", 0),
                        mdns=False,
                        peers_file=Path("/nonexistent"),
                    ).peer_id
                    records.append(seal(largest(other, 1), NodeSigner(fake)))
                version += 1
                payload = msgspec.msgpack.encode(Delta(news=News(records=tuple(records))))
                cast = rpc.pack(rpc.Cast(GOSSIP.name, payload))
                for _ in range(BATCH):
                    await stream.write(cast)
        except StreamClosed:
            await trio.lowlevel.checkpoint()


async def main(ticket: str, directory: Path) -> None:
    parsed = Ticket.parse(ticket)
    seed = secrets.token_bytes(32)
    network = Libp2pNetwork(
        node_seed=seed,
        cluster_key=parsed.key,
        listen=("127.0.0.1", 0),
        mdns=False,
        peers_file=directory / "peers.json",
        join=parsed.addresses,
    )
    async with trio.open_nursery() as nursery:
        await nursery.start(network.run)
        with trio.fail_after(20):
            while not network.peers():
                await trio.sleep(0.05)
        print("flooding", network.peer_id, flush=True)
        while True:
            for peer in network.peers():
                try:
                    with trio.move_on_after(5):
                        await flood(network, seed, peer)
                except (StreamClosed, PeerUnreachable) as error:
                    print("thrown out:", error, flush=True)
            await trio.sleep(0.05)


if __name__ == "__main__":
    trio.run(main, sys.argv[1], Path(sys.argv[2]))
