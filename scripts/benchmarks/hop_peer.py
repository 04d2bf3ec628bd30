"""The far end of a hop: a pxd network, and a bare TLS socket beside it.

    python -m scripts.benchmarks.hop_peer DIRECTORY

Writes down where it listens as `peer.json` and serves until it is ended.
"""

import json
import os
import socket
import ssl
import sys
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import trio

from pxd import wire
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.tls import Certificate

HIDDEN = 1024
"""As Qwen3-0.6B has it."""

KEY = b"k" * 32
ECHO, COUNTDOWN, ACKNOWLEDGE = b"\0", b"\1", b"\2"
"""What a message asks for: itself, nothing, or a word that it has come."""


@dataclass(frozen=True)
class Address:
    """`network` are the multiaddrs of the pxd network; `port` is the bare socket's."""

    network: tuple[str, ...]
    port: int
    certificate: bytes

    @classmethod
    def read(cls, directory: Path) -> Self | None:
        try:
            found = json.loads((directory / "peer.json").read_text())
        except FileNotFoundError:
            return None
        return cls(tuple(found["network"]), found["port"], bytes.fromhex(found["certificate"]))

    def write(self, directory: Path) -> None:
        content = {
            "network": self.network,
            "port": self.port,
            "certificate": self.certificate.hex(),
        }
        partial = directory / "peer.json.partial"
        partial.write_text(json.dumps(content))
        os.replace(partial, directory / "peer.json")


def frame(kind: bytes, body: bytes) -> wire.Step:
    """A step that carries the activations of `body`."""
    return wire.Step(
        pipeline="bench",
        session=kind[0],
        step=0,
        rows=(),
        tensor=wire.Tensor("bf16", (len(body) // 2 // HIDDEN, HIDDEN)),
    )


def network(seed: bytes, directory: Path, *join: str) -> Libp2pNetwork:
    return Libp2pNetwork(
        node_seed=seed * 32,
        cluster_key=KEY,
        listen=("127.0.0.1", 0),
        mdns=False,
        peers_file=directory / f"peers-{seed.decode()}.json",
        join=join,
    )


def read_exactly(connection: ssl.SSLSocket, size: int) -> bytearray:
    """Raises EOFError at the end."""
    data = bytearray(size)
    view, done = memoryview(data), 0
    while done < size:
        count = connection.recv_into(view[done:])
        if count == 0:
            raise EOFError
        done += count
    return data


def serve_bare(listener: socket.socket, context: ssl.SSLContext) -> None:
    """One connection, to its end."""
    plain, _ = listener.accept()
    plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    with context.wrap_socket(plain, server_side=True) as connection:
        while True:
            try:
                header = read_exactly(connection, 5)
                body = read_exactly(connection, int.from_bytes(header[1:], "big"))
            except EOFError:
                return
            if header[:1] == ECHO:
                connection.sendall(body)
            elif header[:1] == ACKNOWLEDGE:
                connection.sendall(b".")


async def main(directory: Path) -> None:
    certificate = Certificate("peer")
    context = certificate.context([(directory / "bench.der").read_bytes()], server=True)
    listener = socket.create_server(("127.0.0.1", 0))
    threading.Thread(target=serve_bare, args=(listener, context), daemon=True).start()
    own = network(b"b", directory)

    async def answer(peer: str, message: wire.Frame, body: wire.Buffer) -> None:
        assert isinstance(message, wire.Step)
        if message.session == ECHO[0]:
            await own.send(peer, message, body)
        elif message.session == ACKNOWLEDGE[0]:
            await own.send(peer, wire.Sampled(pipeline="bench", session=0, step=0, tokens=()))

    own.on_frame(answer)
    async with trio.open_nursery() as nursery:
        await nursery.start(own.run)
        port = listener.getsockname()[1]
        Address(own.addresses(), port, certificate.der).write(directory)


if __name__ == "__main__":
    trio.run(main, Path(sys.argv[1]))
