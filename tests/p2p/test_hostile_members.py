"""A member that holds the key and still sends nonsense costs itself a stream, and nobody else."""

import contextlib

import msgspec
import pytest
import trio

from pxd import wire
from pxd.p2p import channels, rpc
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.network import CallFailed
from tests.p2p.nodes import ECHO, Nodes, Text
from tests.p2p.test_channels import Collector, step
from tests.p2p.test_rpc import SLOW


async def raw_stream(source: Libp2pNetwork, target: Libp2pNetwork, protocol: str) -> YamuxStream:
    session = source._sessions.get(target.peer_id)
    assert session is not None
    return await session.connection.open_stream(protocol)


async def expect_end(stream: YamuxStream) -> bytes:
    """What the other side still sends before it ends the stream."""
    heard = bytearray()
    with trio.fail_after(10), contextlib.suppress(StreamClosed):
        while data := await stream.read_some(1 << 16):
            heard += data
    return bytes(heard)


@pytest.mark.parametrize(
    "data",
    [
        b"\xff\xff\xff\xff",
        rpc.pack("not a message"),
        rpc.pack(["request", 1, "test.echo"]),
        rpc.pack(rpc.Request(1, "test.echo", -1.0, b"")),
        rpc.pack(rpc.Answer(1, b"")),
        b"\0\0\0\x04\xc1\xc1\xc1\xc1",
    ],
    ids=["4 GiB", "a string", "half a request", "negative timeout", "an answer", "not msgpack"],
)
async def test_nonsense_instead_of_calls(nodes: Nodes, data: bytes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    stream = await raw_stream(b, a, rpc.PROTOCOL)
    await stream.write(data)
    assert await expect_end(stream) == b""
    assert await b.call(a.peer_id, ECHO, Text("fine"), timeout=5) == Text("fine")


async def test_too_many_calls_are_refused_as_busy(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    gate = trio.Event()

    async def slow(peer: str, request: Text) -> Text:
        await gate.wait()
        return request

    a.serve(SLOW, slow)
    stream = await raw_stream(b, a, rpc.PROTOCOL)
    payload = msgspec.msgpack.encode(Text(""))
    for number in range(rpc.CALLS_SERVED + 1):
        await stream.write(rpc.pack(rpc.Request(number, SLOW.name, 60.0, payload)))
    answers = msgspec.msgpack.Decoder(rpc.Answer | rpc.Failure)
    with trio.fail_after(10):
        refused = await rpc.read_message(stream, answers)
    assert isinstance(refused, rpc.Failure)
    assert (refused.id, refused.code) == (rpc.CALLS_SERVED, "busy")
    gate.set()


@pytest.mark.parametrize(
    "data",
    [
        b"\0\0\0\0\0\0\0\0",
        b"\xff\xff\xff\xff\0\0\0\0",
        b"\0\0\0\x01\xff\xff\xff\xff",
        b"\0\0\0\x04\0\0\0\0\xc1\xc1\xc1\xc1",
        wire.encode(step(1, 100), 7) + b"1234567",
        wire.encode(wire.Cancel(request="x"), 1) + b"1",
    ],
    ids=["no header", "huge header", "huge body", "not msgpack", "wrong size", "unwanted body"],
)
async def test_nonsense_instead_of_frames(nodes: Nodes, data: bytes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    at_a = Collector(a)
    stream = await raw_stream(b, a, channels.PROTOCOL)
    await stream.write(data)
    assert await expect_end(stream) == b""
    await b.send(a.peer_id, step(2, 1), b"ok")
    assert await at_a.wait_for(1) == [(b.peer_id, step(2, 1), b"ok")]


async def test_something_that_is_no_certificate(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    at_a = Collector(a)
    for offer in (b"", b"nonsense", b"\x30\x82" * 1000):
        with pytest.raises(CallFailed) as failure:
            await b.call(a.peer_id, channels.OFFER, channels.Offer(offer), timeout=5)
        assert failure.value.code == "bad-request"
    await b.send(a.peer_id, step(1, 1), b"ok")
    await at_a.wait_for(1)
