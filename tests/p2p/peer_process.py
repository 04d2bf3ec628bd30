"""A member in a process of its own, for tests that kill it. Arguments: a directory, addresses."""

import sys
from pathlib import Path

import trio

from pxd import wire
from pxd.p2p.libp2p_network import Libp2pNetwork
from tests.p2p.nodes import ECHO, KEY, echo


async def main(directory: str, *join: str) -> None:
    network = Libp2pNetwork(
        node_seed=b"q" * 32,
        cluster_key=KEY,
        listen=("127.0.0.1", 0),
        mdns=False,
        peers_file=Path(directory) / "peers.json",
        join=join,
    )

    async def send_back(peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        await network.send(peer, frame, body)

    network.serve(ECHO, echo)
    network.on_frame(send_back)
    await network.run()


if __name__ == "__main__":
    trio.run(main, *sys.argv[1:])
