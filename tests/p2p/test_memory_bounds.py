"""What one peer can make a node hold, be it a stranger or a member: bounded, whatever it opens."""

import struct
import tracemalloc

import pytest
import trio

from pxd import wire
from pxd.p2p import channels, keyproof, rpc
from pxd.p2p.host import ADMISSION_TIMEOUT, STREAMS_PER_STRANGER
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import ACK, PING
from pxd.p2p.network import CallFailed, Method
from pxd.p2p.secure import select
from pxd.p2p.tls import Certificate, TlsStream
from tests.p2p.nodes import ECHO, Nodes, Text, eventually
from tests.p2p.test_channels import Collector, step
from tests.p2p.test_hostile_members import expect_end, raw_stream
from tests.p2p.test_strangers import dial_as_stranger

BLOB = Method("test.blob", bytes, type(None))


def tasks() -> int:
    return trio.lowlevel.current_statistics().tasks_living


async def test_streams_that_a_stranger_opens_and_resets_leave_nothing_behind(nodes: Nodes) -> None:
    a = await nodes.start()
    async with trio.open_nursery() as nursery:
        muxer = await dial_as_stranger(nursery, a)
        await select([keyproof.PROTOCOL], muxer.open_stream())
        before = tasks()
        for _ in range(20):
            for _ in range(50):
                muxer.open_stream().reset()
            await trio.sleep(0.01)
        with trio.move_on_after(1):
            while tasks() < before + 100:
                await trio.sleep(0.01)
        assert tasks() < before + 50
        nursery.cancel_scope.cancel()


async def test_a_stranger_has_two_windows_to_fill(nodes: Nodes) -> None:
    a = await nodes.start()
    async with trio.open_nursery() as nursery:
        muxer = await dial_as_stranger(nursery, a)
        for _ in range(5):
            muxer.open_stream()
        await eventually(lambda: len(muxer._streams) == STREAMS_PER_STRANGER)
        [inside] = a._host._connections
        assert len(inside.muxer._streams) == STREAMS_PER_STRANGER
        nursery.cancel_scope.cancel()


async def test_a_stranger_may_send_so_much(nodes: Nodes) -> None:
    """Else it could keep this node parsing until its time is up."""
    a = await nodes.start()
    async with trio.open_nursery() as nursery:
        muxer = await dial_as_stranger(nursery, a)
        await eventually(lambda: bool(a._host._connections))
        [inside] = a._host._connections
        with trio.fail_after(ADMISSION_TIMEOUT):
            while not muxer.closed.is_set():
                for _ in range(500):
                    muxer.control(PING, ACK, 0)
                await trio.sleep(0.001)
        assert "more than it may send yet" in inside.muxer.reason
        nursery.cancel_scope.cancel()


async def test_a_member_has_one_stream_for_its_calls(nodes: Nodes) -> None:
    """Each of them may hold a message that is never completed."""
    a = await nodes.start()
    b = await nodes.start(a)
    first = await raw_stream(b, a, rpc.PROTOCOL)
    await first.write(struct.pack(">I", rpc.MESSAGE_LIMIT) + b"x" * 100_000)
    await raw_stream(b, a, rpc.PROTOCOL)
    assert await expect_end(first) == b""
    assert await b.call(a.peer_id, ECHO, Text("fine"), timeout=5) == Text("fine")


async def test_the_calls_of_a_member_that_run_hold_so_many_bytes(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    gate = trio.Event()

    async def slow(_peer: str, _request: bytes) -> None:
        await gate.wait()

    a.serve(BLOB, slow)
    blob = bytes(rpc.MESSAGE_LIMIT - 100)
    codes: list[str] = []

    async def call() -> None:
        try:
            await b.call(a.peer_id, BLOB, blob, timeout=60)
        except CallFailed as error:
            codes.append(error.code)
            if len(codes) == 4:
                gate.set()
        else:
            codes.append("ok")

    count = rpc.BYTES_SERVED // len(blob) + 4
    with trio.fail_after(60):
        async with trio.open_nursery() as nursery:
            for _ in range(count):
                nursery.start_soon(call)
    assert (codes.count("busy"), codes.count("ok")) == (4, count - 4)


async def data_stream(source: Libp2pNetwork, target: Libp2pNetwork) -> TlsStream:
    """A data channel beside the one that `source` may have."""
    there = await source.call(
        target.peer_id,
        channels.OFFER,
        channels.Offer(source._channels._certificate.der),
        timeout=5,
    )
    transport = await trio.open_tcp_stream("127.0.0.1", there.port)
    context = source._channels._certificate.context([there.certificate], server=False)
    stream = TlsStream(transport, context, server=False)
    await stream.handshake()
    return stream


async def test_frames_wait_on_one_channel_only(nodes: Nodes) -> None:
    """While a frame is handled, none is read from other channels of the peer."""
    a = await nodes.start()
    b = await nodes.start(a)
    at_a = Collector(a)
    at_a.gate = trio.Event()
    frame, body = step(1, 1 << 20), bytes(2 << 20)
    await b.send(a.peer_id, frame, body)
    await eventually(lambda: bool(a._inbox._streams))
    before = tasks()
    for _ in range(20):
        stream = await data_stream(b, a)
        with trio.move_on_after(0.2):
            await stream.write(wire.encode(frame, len(body)), body)
    assert tasks() < before + 20
    at_a.gate.set()
    last = await data_stream(b, a)
    await last.write(wire.encode(wire.Cancel(request="last")))
    await eventually(lambda: at_a.frames[-1][1] == wire.Cancel(request="last"))


@pytest.mark.parametrize("direct", [True, False], ids=["tls", "libp2p"])
async def test_a_body_that_is_not_wanted_is_not_held(nodes: Nodes, direct: bool) -> None:
    a = await nodes.start(direct=direct)
    b = await nodes.start(a, direct=direct)
    at_a = Collector(a)
    a.on_frame(at_a.handle, lambda peer, frame: frame != step(1, 32 << 20))
    tracemalloc.start()
    try:
        await b.send(a.peer_id, step(1, 32 << 20), bytes(64 << 20))
        await b.send(a.peer_id, step(2, 1), b"ok")
        assert await at_a.wait_for(2) == [
            (b.peer_id, step(1, 32 << 20), b""),
            (b.peer_id, step(2, 1), b"ok"),
        ]
        _, most = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    # Once at the sender.
    assert most < 96 << 20


async def test_nobody_announces_another_ones_certificate(nodes: Nodes) -> None:
    """Else the frames of its owner would count as the thief's."""
    a = await nodes.start()
    b = await nodes.start(a)
    thief = await nodes.start(a, b)
    at_a = Collector(a)
    await b.send(a.peer_id, step(1, 1), b"ok")
    await at_a.wait_for(1)
    mine = channels.Offer(thief._channels._certificate.der)
    stolen = (await thief.call(b.peer_id, channels.OFFER, mine, timeout=5)).certificate
    for der in (stolen, stolen + mine.certificate, mine.certificate + stolen):
        with pytest.raises(CallFailed) as failure:
            await thief.call(a.peer_id, channels.OFFER, channels.Offer(der), timeout=5)
        assert failure.value.code == "bad-request"
    other = channels.Offer(Certificate(b.peer_id).der)
    with pytest.raises(CallFailed):
        await thief.call(a.peer_id, channels.OFFER, other, timeout=5)
