"""Frames between real networks, over direct TLS and over the libp2p stream in its place."""

import logging
import ssl

import pytest
import trio
import trio.testing

from pxd import wire
from pxd.p2p import channels
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.tls import Certificate
from tests.p2p.nodes import ECHO, Nodes, Text, connected, eventually

Received = tuple[str, wire.Frame, bytes]


def step(number: int, values: int) -> wire.Step:
    tensor = wire.Tensor("bf16", (values,))
    return wire.Step(pipeline="p", session=1, step=number, rows=(), tensor=tensor)


class Collector:
    """A frame handler that notes what comes, and waits while `gate` is not set."""

    def __init__(self, network: Libp2pNetwork) -> None:
        self.frames: list[Received] = []
        self.gate = trio.Event()
        self.gate.set()
        network.on_frame(self.handle)

    async def handle(self, peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        await self.gate.wait()
        if isinstance(frame, wire.Cancel) and frame.request == "bad":
            raise RuntimeError("a handler that fails")
        self.frames.append((peer, frame, bytes(body)))

    async def wait_for(self, count: int) -> list[Received]:
        await eventually(lambda: len(self.frames) >= count)
        return self.frames


async def push(stream: trio.SSLStream, data: bytes) -> None:
    while True:
        await stream.send_all(data)
        await stream.receive_some(1)


@pytest.mark.parametrize("direct", [True, False], ids=["tls", "libp2p"])
async def test_frames_arrive_in_order_with_their_bodies(
    nodes: Nodes, direct: bool, caplog: pytest.LogCaptureFixture
) -> None:
    a = await nodes.start(direct=direct)
    b = await nodes.start(a, direct=direct)
    at_a, at_b = Collector(a), Collector(b)
    sizes = [0, 1, 7000, 8192, 8193, 300_000, 4_000_001]
    bodies = [bytes(range(256)) * (2 * size // 256) + bytes(2 * size % 256) for size in sizes]

    async def send_all(source: Libp2pNetwork, target: Libp2pNetwork) -> None:
        for number, (size, body) in enumerate(zip(sizes, bodies, strict=True)):
            frame = step(number, size) if size else wire.Cancel(request="small")
            await source.send(
                target.peer_id, frame, (bytes, bytearray, memoryview)[number % 3](body)
            )

    with caplog.at_level(logging.WARNING, "pxd.p2p"):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(send_all, a, b)
            nursery.start_soon(send_all, b, a)
        for collector, source in ((at_a, b), (at_b, a)):
            frames = await collector.wait_for(len(sizes))
            assert [body for _, _, body in frames] == bodies
            assert {peer for peer, _, _ in frames} == {source.peer_id}
            assert [f.step for _, f, _ in frames if isinstance(f, wire.Step)] == [*range(1, 7)]
    assert not [record for record in caplog.records if record.levelno > logging.INFO]


async def test_without_a_direct_way_frames_take_the_libp2p_connection(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    at_a = Collector(a)

    async def blocked(host: str, port: int) -> trio.SocketStream:
        raise OSError("a firewall is in the way")

    monkeypatch.setattr(channels.trio, "open_tcp_stream", blocked)
    with caplog.at_level(logging.WARNING, "pxd.p2p"):
        await b.send(a.peer_id, step(1, 4), bytes(8))
    assert await at_a.wait_for(1) == [(b.peer_id, step(1, 4), bytes(8))]
    assert "a firewall is in the way" in caplog.text


async def test_frames_to_oneself_are_handled_in_order_even_when_the_handler_sends(
    nodes: Nodes,
) -> None:
    a = await nodes.start()
    seen: list[int] = []

    async def handle(peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        assert isinstance(frame, wire.Step)
        assert peer == a.peer_id
        seen.append(frame.step)
        if frame.step < 1000:
            await a.send(a.peer_id, step(frame.step + 1000, 1), body)

    a.on_frame(handle)
    for number in range(100):
        await a.send(a.peer_id, step(number, 1), b"xx")
    await eventually(lambda: len(seen) == 200)
    assert [number for number in seen if number < 1000] == [*range(100)]
    assert [number for number in seen if number >= 1000] == [*range(1000, 1100)]


async def test_small_frames_wait_for_a_slow_reader_and_none_is_lost(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    at_b = Collector(b)
    await a.send(b.peer_id, step(0, 0))
    await at_b.wait_for(1)
    at_b.gate = trio.Event()
    total, sent = 4000, 1
    body = bytes(8000)

    async def press() -> None:
        nonlocal sent
        while sent < total:
            await a.send(b.peer_id, step(sent, 4000), body)
            sent += 1

    nursery.start_soon(press)
    await eventually(lambda: sent > 1)
    before = 0
    while sent > before:
        before = sent
        await trio.testing.wait_all_tasks_blocked(0.1)
    assert sent < total / 2
    at_b.gate.set()
    frames = await at_b.wait_for(total)
    assert [frame.step for _, frame, _ in frames if isinstance(frame, wire.Step)] == [*range(total)]


async def test_a_slow_reader_holds_back_its_sender_and_nobody_else(
    nodes: Nodes, nursery: trio.Nursery
) -> None:
    a = await nodes.start()
    slow, quick = await nodes.start(a), await nodes.start(a)
    at_slow, at_quick = Collector(slow), Collector(quick)
    at_slow.gate = trio.Event()
    sent = 0

    async def press() -> None:
        nonlocal sent
        while sent < 100:
            await a.send(slow.peer_id, step(sent, 1 << 20), bytes(2 << 20))
            sent += 1

    nursery.start_soon(press)
    for number in range(30):
        await a.send(quick.peer_id, step(number, 1000), bytes(2000))
    await at_quick.wait_for(30)
    assert await a.call(slow.peer_id, ECHO, Text("control works"), timeout=5)
    assert sent < 100
    at_slow.gate.set()
    frames = await at_slow.wait_for(100)
    assert [f.step for _, f, _ in frames if isinstance(f, wire.Step)] == [*range(100)]


@pytest.mark.parametrize("direct", [True, False], ids=["tls", "libp2p"])
async def test_cancelled_sends_never_corrupt_the_channel(nodes: Nodes, direct: bool) -> None:
    a = await nodes.start(direct=direct)
    b = await nodes.start(a, direct=direct)
    at_b = Collector(b)
    at_b.gate = trio.Event()
    body = bytes(3 << 20)
    for number in range(40):
        with trio.move_on_after(0 if number % 2 else 0.01):
            await a.send(b.peer_id, step(number, len(body) // 2), body)
    at_b.gate.set()
    await a.send(b.peer_id, step(99, 2), b"last")
    await eventually(lambda: bool(at_b.frames) and at_b.frames[-1][2] == b"last")
    numbers = [f.step for _, f, _ in at_b.frames if isinstance(f, wire.Step)]
    assert numbers == sorted(set(numbers))


async def test_a_failing_handler_closes_that_channel_and_the_sender_learns_of_it(
    nodes: Nodes,
) -> None:
    a = await nodes.start()
    b, c = await nodes.start(a), await nodes.start(a)
    at_a = Collector(a)
    await c.send(a.peer_id, step(0, 1), b"cc")

    async def send_until_broken() -> None:
        while True:
            await b.send(a.peer_id, wire.Cancel(request="bad"))

    with trio.fail_after(10), pytest.raises(PeerUnreachable, match="data channel"):
        await send_until_broken()
    await b.send(a.peer_id, step(1, 1), b"bb")
    await c.send(a.peer_id, step(2, 1), b"dd")
    frames = await at_a.wait_for(3)
    assert {body for _, _, body in frames} == {b"bb", b"cc", b"dd"}


async def test_channels_go_with_the_peer_and_come_back_with_it(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a, seed=60)
    await a.send(b.peer_id, wire.Cancel(request="first"))
    await nodes.stop(b)
    await eventually(lambda: not a.peers())
    with pytest.raises(PeerUnreachable):
        await a.send(b.peer_id, wire.Cancel(request="nobody there"))
    again = await nodes.run(nodes.make(a, seed=60))
    at_again = Collector(again)
    await connected(again, a)
    await a.send(again.peer_id, wire.Cancel(request="second"))
    assert await at_again.wait_for(1) == [(a.peer_id, wire.Cancel(request="second"), b"")]


async def test_a_frame_beyond_the_limits_is_refused_at_the_sender(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    with pytest.raises(wire.WireError):
        await a.send(b.peer_id, step(0, 1), bytes(wire.Limits().body + 1))
    assert await a.call(b.peer_id, ECHO, Text("fine"), timeout=5)


async def test_an_unknown_certificate_is_refused(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    at_a = Collector(a)
    await b.send(a.peer_id, wire.Cancel(request="known"))
    await at_a.wait_for(1)
    port = a._channels._port
    intruder, victim = Certificate(b.peer_id), a._channels._certificate
    context = intruder.context([victim.der], server=False)
    stream = trio.SSLStream(await trio.open_tcp_stream("127.0.0.1", port), context)
    with trio.fail_after(5), pytest.raises((trio.BrokenResourceError, ssl.SSLError)):
        await push(stream, wire.encode(wire.Cancel(request="intruder")))
    await b.send(a.peer_id, wire.Cancel(request="still works"))
    frames = await at_a.wait_for(2)
    assert [f.request for _, f, _ in frames if isinstance(f, wire.Cancel)] == [
        "known",
        "still works",
    ]
