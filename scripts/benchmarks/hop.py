"""One hop between two processes: pxd's data channel beside a bare TLS socket."""

import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import trio

from pxd import wire
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.tls import Certificate
from scripts.benchmarks.bench import Bench, say
from scripts.benchmarks.hop_peer import (
    ACKNOWLEDGE,
    COUNTDOWN,
    ECHO,
    HIDDEN,
    Address,
    frame,
    network,
    read_exactly,
)
from scripts.benchmarks.processes import Program

CONNECT_TIMEOUT_S = 60.0


@dataclass(frozen=True)
class Size:
    """`pings` there and back of one token, `chunks` one way of `positions` each."""

    rounds: int
    pings: int
    chunks: int
    positions: int = 512


def run(bench: Bench) -> None:
    size = Size(3, 200, 32) if bench.quick else Size(5, 500, 64)
    say(f"    {size.pings} tokens and {size.chunks} chunks, {size.rounds} rounds")
    place = bench.place("hop")
    place.mkdir()
    certificate = Certificate("bench")
    (place / "bench.der").write_bytes(certificate.der)
    command = [sys.executable, "-m", "scripts.benchmarks.hop_peer", str(place)]
    program = Program("hop", command, place / "hop.log")
    try:
        address = program.wait_for(lambda: Address.read(place), "starting")
        bare = _Bare(certificate, address)
        try:
            trio.run(_measure, bench, size, bare, address, place)
        finally:
            bare.close()
    finally:
        program.stop()


class _Bare:
    """A TLS 1.3 socket as Python has it: blocking, with nothing around the bytes."""

    def __init__(self, certificate: Certificate, address: Address) -> None:
        context = certificate.context([address.certificate], server=False)
        plain = socket.create_connection(("127.0.0.1", address.port))
        plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._connection = context.wrap_socket(plain)

    def ping(self, body: bytes) -> None:
        """There and back."""
        self._connection.sendall(ECHO + len(body).to_bytes(4, "big") + body)
        read_exactly(self._connection, len(body))

    def push(self, body: bytes, times: int) -> None:
        """One way; waits until all have been read."""
        for left in reversed(range(times)):
            kind = COUNTDOWN if left else ACKNOWLEDGE
            self._connection.sendall(kind + len(body).to_bytes(4, "big") + body)
        read_exactly(self._connection, 1)

    def close(self) -> None:
        self._connection.close()


class _Channel:
    """The same over pxd's own network."""

    def __init__(self, network: Libp2pNetwork, peer: str) -> None:
        self._network, self._peer = network, peer
        self._send, self._answers = trio.open_memory_channel[wire.Frame](1)
        network.on_frame(self._take)

    async def _take(self, _: str, answer: wire.Frame, __: wire.Buffer) -> None:
        await self._send.send(answer)

    async def ping(self, body: bytes) -> None:
        await self._network.send(self._peer, frame(ECHO, body), body)
        await self._answers.receive()

    async def push(self, body: bytes, times: int) -> None:
        for left in reversed(range(times)):
            kind = COUNTDOWN if left else ACKNOWLEDGE
            await self._network.send(self._peer, frame(kind, body), body)
        await self._answers.receive()


async def _measure(bench: Bench, size: Size, bare: _Bare, address: Address, place: Path) -> None:
    token, chunk = bytes(2 * HIDDEN), bytes(2 * HIDDEN * size.positions)
    ours: dict[str, list[float]] = {"hop": [], "prefill": []}
    theirs: dict[str, list[float]] = {"hop": [], "prefill": []}
    own = network(b"a", place, *address.network)
    async with trio.open_nursery() as nursery:
        await nursery.start(own.run)
        with trio.fail_after(CONNECT_TIMEOUT_S):
            while not own.peers():
                await trio.sleep(0.01)
        (peer,) = own.peers()
        channel = _Channel(own, peer)
        # Opens the data channel.
        await channel.push(chunk, 2)
        bare.push(chunk, 2)
        for _ in range(size.rounds):
            began = time.perf_counter()
            for _ in range(size.pings):
                await channel.ping(token)
            ours["hop"].append(1e6 * (time.perf_counter() - began) / size.pings / 2)
            theirs["hop"].append(
                1e6 * _seconds(lambda: _pings(bare, token, size.pings)) / size.pings / 2
            )
            began = time.perf_counter()
            await channel.push(chunk, size.chunks)
            moved = size.chunks * len(chunk) / 2**20
            ours["prefill"].append(moved / (time.perf_counter() - began))
            theirs["prefill"].append(moved / _seconds(lambda: bare.push(chunk, size.chunks)))
        nursery.cancel_scope.cancel()
    kib = len(token) // 1024
    what = f"a token's activation ({kib} KiB), one way, pxd vs bare TLS"
    bench.compare("hop.token", what, "µs", ours["hop"], theirs["hop"])
    what = f"{size.positions} positions a frame ({len(chunk) >> 10} KiB), pxd vs bare TLS"
    bench.compare(
        "hop.prefill", what, "MiB/s", ours["prefill"], theirs["prefill"], more_is_better=True
    )


def _pings(bare: _Bare, body: bytes, times: int) -> None:
    for _ in range(times):
        bare.ping(body)


def _seconds(work: Callable[[], None]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
