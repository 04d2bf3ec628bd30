"""Connections through another member, on loopback."""

import contextlib
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
import trio
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage

from pxd import wire
from pxd.doctor.facts import Relaying
from pxd.p2p import circuit, observed, punch, relay
from pxd.p2p.circuit import HOP, STOP, CircuitRefused, read_message, write_message
from pxd.p2p.host import Connection, DialFailed
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.network import PeerUnreachable
from tests.p2p.nodes import ECHO, Nodes, Text, connected, eventually
from tests.p2p.star import Star, link

FRAME = wire.Cancel(request="r")


async def test_calls_and_frames_pass_in_both_directions(star: Star) -> None:
    a, b = await star.joined()
    assert (await b.call(a.peer_id, ECHO, Text("back"), timeout=10)).text == "back"
    received: list[tuple[str, wire.Frame, bytes]] = []
    for node in (a, b):

        async def take(peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
            received.append((peer, frame, bytes(body)))

        node.on_frame(take)
    await a.send(b.peer_id, FRAME)
    await b.send(a.peer_id, FRAME)
    await eventually(lambda: len(received) == 2)
    assert {peer for peer, _, _ in received} == {a.peer_id, b.peer_id}
    assert a.relayed() == {b.peer_id}
    assert b.relayed() == {a.peer_id}
    assert a.host_of(b.peer_id) == ""
    assert star.middle.relayed() == frozenset()
    assert isinstance(a, Relaying), "the doctor asks for it"
    assert star.circuits == 1


async def test_the_relay_sees_neither_calls_nor_keys(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = bytearray()
    read_some = YamuxStream.read_some

    async def record(stream: YamuxStream, limit: int) -> bytes:
        data = await read_some(stream, limit)
        if limit == relay.CHUNK:
            seen.extend(data)
        return data

    monkeypatch.setattr(relay, "CHUNK", 12345)
    monkeypatch.setattr(YamuxStream, "read_some", record)
    a, b = await star.joined()
    secret = "a prompt that is nobody's business"
    assert (await a.call(b.peer_id, ECHO, Text(secret), timeout=10)).text == secret
    assert len(seen) > 2 * len(secret)
    assert secret.encode() not in seen
    assert b"/pxd/proof" not in seen


async def test_nobody_is_passed_on_by_a_member_that_was_not_started_as_a_relay(
    nodes: Nodes,
) -> None:
    middle = await nodes.start()
    a, b = await nodes.start(middle), await nodes.start(middle)
    a.use_relays(frozenset({middle.peer_id}))
    with pytest.raises(PeerUnreachable, match="does not pass traffic on"):
        await a.call(b.peer_id, ECHO, Text("?"), timeout=10)


async def test_a_relay_is_asked_only_if_its_record_or_a_ticket_says_that_it_is_one(
    star: Star,
) -> None:
    a, b = await star.member(), await star.member()
    a.use_relays(frozenset())
    with pytest.raises(PeerUnreachable, match="no address"):
        await a.call(b.peer_id, ECHO, Text("?"), timeout=10)
    assert star.circuits == 0


async def test_a_ticket_may_lead_through_a_relay(star: Star) -> None:
    a = await star.member()
    [through] = a.circuit_addresses()
    [at] = star.middle.addresses()
    assert through == f"{at}/p2p-circuit/p2p/{a.peer_id}"
    b = await star.nodes.run(star.nodes.make(through))
    await connected(a, b)
    assert b.relayed() == {a.peer_id}


@pytest.mark.parametrize(
    "text",
    [
        "/ip4/10.0.0.1/tcp/1/p2p/{a}",
        "/ip4/10.0.0.1/tcp/1/p2p/{a}/p2p-circuit/p2p/{a}",
        "/ip4/10.0.0.1/tcp/1/p2p/{a}/p2p-circuit/p2p/",
        "/ip4/10.0.0.1/tcp/1/p2p/{a}/p2p-circuit/p2p/{b}/p2p-circuit/p2p/{a}",
        "/p2p-circuit/p2p/{a}",
    ],
)
def test_what_is_no_address_through_a_relay(text: str) -> None:
    with pytest.raises(ValueError):
        circuit.split_circuit(text.format(a="A" * 40, b="B" * 40))


@asynccontextmanager
async def hop(member: Connection, *messages: Any) -> AsyncIterator[tuple[int, YamuxStream]]:
    """Say this to a relay; gives the status it answers with, and the stream."""
    stream = await member.open_stream(HOP)
    try:
        for message in messages:
            if isinstance(message, bytes):
                await stream.write(message)
            else:
                await write_message(stream, message)
        with trio.fail_after(5):
            answer = await read_message(stream, HopMessage)
        assert answer.type == HopMessage.STATUS
        yield answer.status, stream
    finally:
        stream.reset()


def connect(peer: str) -> HopMessage:
    return HopMessage(type=HopMessage.CONNECT, peer=circuit.peer_message(peer))


async def test_what_makes_no_sense_is_refused_with_a_status(star: Star) -> None:
    a, b = await star.joined()
    to_relay = link(a, star.middle)
    for expected, message in (
        (Status.MALFORMED_MESSAGE, b"\x05\xff\xff\xff\xff\xff"),
        (Status.MALFORMED_MESSAGE, b"\xff\xff\xff\xff\x0f"),
        (Status.MALFORMED_MESSAGE, HopMessage(type=HopMessage.CONNECT)),
        (
            Status.MALFORMED_MESSAGE,
            HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"\x01" * 65)),
        ),
        (Status.NO_RESERVATION, HopMessage(type=HopMessage.CONNECT, peer=PeerId(id=b"\x01" * 40))),
        (Status.RESERVATION_REFUSED, HopMessage(type=HopMessage.RESERVE)),
        (Status.UNEXPECTED_MESSAGE, HopMessage(type=HopMessage.STATUS, status=Status.OK)),
        (Status.PERMISSION_DENIED, connect(a.peer_id)),
        (Status.NO_RESERVATION, connect(star.middle.peer_id)),
        (Status.NO_RESERVATION, connect(str(ID(b"\x00\x24\x08\x01\x12\x20" + b"x" * 32)))),
    ):
        async with hop(to_relay, message) as (status, _):
            assert Status.Name(status) == Status.Name(expected), message
    assert star.circuits == 1
    assert (await a.call(b.peer_id, ECHO, Text("still"), timeout=5)).text == "still"


async def test_garbage_instead_of_a_handshake_harms_nobody(star: Star) -> None:
    a, b = await star.member(), await star.member()
    async with hop(link(a, star.middle), connect(b.peer_id)) as (status, stream):
        assert status == Status.OK
        await stream.write(b"\x13/multistream/1.0.0\n" + b"garbage" * 100)
        with pytest.raises(StreamClosed):
            await stream.read_exactly(1 << 20)
    await eventually(lambda: star.circuits == 0)
    assert b.peers() == {star.middle.peer_id}
    assert (await a.call(b.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"


async def test_garbage_from_a_relay_harms_nobody(star: Star) -> None:
    a = await star.member()
    from_relay = link(star.middle, a)
    for message in (
        b"\x05\xff\xff\xff\xff\xff",
        StopMessage(type=StopMessage.STATUS, status=Status.OK),
        StopMessage(type=StopMessage.CONNECT, peer=PeerId(id=b"\x01" * 65)),
    ):
        stream = await from_relay.open_stream(STOP)
        if isinstance(message, bytes):
            await stream.write(message)
        else:
            await write_message(stream, message)
            answer = await read_message(stream, StopMessage)
            assert answer.status == Status.MALFORMED_MESSAGE
        with pytest.raises(StreamClosed):
            await stream.read_exactly(1)
    for protocol in (punch.PROTOCOL, observed.PROTOCOL):
        stream = await from_relay.open_stream(protocol)
        with contextlib.suppress(StreamClosed):
            await stream.write(b"\x05\xff\xff\xff\xff\xff" * 10)
    assert (await star.middle.call(a.peer_id, ECHO, Text("hi"), timeout=5)).text == "hi"


async def test_who_comes_over_a_relay_is_who_the_relay_says_or_nobody(star: Star) -> None:
    a, b = await star.member(), await star.member()
    # A relay that lies: it announces itself, and passes a on.
    onward = await link(star.middle, b).open_stream(STOP)
    peer = circuit.peer_message(star.middle.peer_id)
    await write_message(onward, StopMessage(type=StopMessage.CONNECT, peer=peer))
    assert (await read_message(onward, StopMessage)).status == Status.OK
    hijacked = circuit.CircuitStream(onward)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(_expect_failure, a, hijacked, b.peer_id)
    assert b.peers() == {star.middle.peer_id}


async def _expect_failure(
    dialer: Libp2pNetwork, transport: circuit.CircuitStream, peer: str
) -> None:
    async def opened() -> circuit.CircuitStream:
        return transport

    with pytest.raises(DialFailed):
        await dialer._host.dial_over(opened, peer, circuit.Route("a lie", relay="x"))


async def test_a_stranger_is_offered_no_relay(star: Star) -> None:
    a = await star.member()
    stranger = star.nodes.make(star.middle, key=b"x" * 32)
    stranger.use_relays(frozenset({star.middle.peer_id}))
    await star.nodes.run(stranger)
    await eventually(lambda: bool(stranger.refusals()))
    with pytest.raises(PeerUnreachable):
        await stranger.call(a.peer_id, ECHO, Text("let me in"), timeout=5)
    assert star.circuits == 0


async def test_a_key_of_another_cluster_does_not_help_over_a_relay(star: Star) -> None:
    """The relay lets both in, but the two ends prove the key to each other, too."""
    a, b = await star.member(), await star.member()
    ring = b._admission.ring
    b.set_keys(type(ring).first(b"y" * 32))
    with pytest.raises(PeerUnreachable, match="another cluster's key"):
        await a.call(b.peer_id, ECHO, Text("hi"), timeout=10)
    await eventually(lambda: star.circuits == 0)
    assert [refusal.reason for refusal in b.refusals()] == ["wrong-key"]


async def test_a_banned_member_is_passed_on_by_nobody(star: Star) -> None:
    a, b = await star.joined()
    await star.middle.shut_out(frozenset({a.peer_id}))
    await eventually(lambda: not b.peers() - {star.middle.peer_id})
    assert star.circuits == 0
    c = await star.member()
    # A target that the relay does not know to be banned, but the caller's other end does.
    await b.shut_out(frozenset({c.peer_id}))
    with pytest.raises(PeerUnreachable):
        await c.call(b.peer_id, ECHO, Text("hi"), timeout=10)
    with pytest.raises(CircuitRefused) as refused:
        await c._circuits.dial(link(c, star.middle), b.peer_id)
    assert refused.value.status == Status.PERMISSION_DENIED


async def test_nothing_is_relayed_over_a_relayed_connection(star: Star) -> None:
    a, b = await star.member(), await star.nodes.start(star.middle, relay=True)
    a.use_relays(frozenset({star.middle.peer_id, b.peer_id}))
    assert (await a.call(b.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"
    c = await star.nodes.start(b)
    assert a.relayed() == {b.peer_id}
    async with hop(link(a, b), connect(c.peer_id)) as (status, _):
        assert status == Status.PERMISSION_DENIED
    with pytest.raises(PeerUnreachable, match="not connected with it"):
        await a.call(c.peer_id, ECHO, Text("hi"), timeout=10)


@pytest.mark.parametrize("bound", ["CIRCUITS", "CIRCUITS_PER_MEMBER"])
async def test_circuits_are_bounded(
    star: Star, monkeypatch: pytest.MonkeyPatch, bound: str
) -> None:
    monkeypatch.setattr(relay, bound, 2)
    a, b = await star.joined()
    c, d = await star.member(), await star.member()
    assert (await a.call(c.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"
    async with hop(link(a, star.middle), connect(d.peer_id)) as (status, _):
        assert status == Status.RESOURCE_LIMIT_EXCEEDED
    async with hop(link(d, star.middle), connect(a.peer_id)) as (status, _):
        assert status == Status.RESOURCE_LIMIT_EXCEEDED
    await star.nodes.stop(c)
    await eventually(lambda: star.circuits == 1)
    assert (await a.call(d.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"
    assert (await a.call(b.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"


async def test_bulk_does_not_keep_the_relay_from_answering(star: Star) -> None:
    a, b = await star.joined()
    arrived = 0

    async def take(_peer: str, _frame: wire.Frame, body: wire.Buffer) -> None:
        nonlocal arrived
        arrived += len(body)
        await trio.lowlevel.checkpoint()

    b.on_frame(take)
    size = 8 << 20
    step = wire.Step(
        pipeline="p", session=1, step=1, rows=(), tensor=wire.Tensor("i32", (size // 4,))
    )

    async def bulk() -> None:
        while True:
            await a.send(b.peer_id, step, bytes(size))

    async with trio.open_nursery() as nursery:
        nursery.start_soon(bulk)
        for node in (a, b, star.middle):
            other = star.middle if node is not star.middle else b
            for _ in range(20):
                await node.call(other.peer_id, ECHO, Text("hi"), timeout=5)
        await eventually(lambda: arrived >= 2 * size)
        nursery.cancel_scope.cancel()


async def test_an_end_that_does_not_read_holds_the_other_back(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await star.member(), await star.member()
    served = trio.Event()

    async def never_read(_connection: Connection, stream: YamuxStream) -> None:
        stream.window = circuit.WINDOW
        await read_message(stream, StopMessage)
        await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
        await served.wait()

    monkeypatch.setitem(b._host.handlers, STOP, never_read)
    async with hop(link(a, star.middle), connect(b.peer_id)) as (status, stream):
        assert status == Status.OK
        sent = 0

        async def flood() -> None:
            nonlocal sent
            while True:
                await stream.write(bytes(16 * 1024))
                sent += 16 * 1024

        async with trio.open_nursery() as nursery:
            nursery.start_soon(flood)
            # A window at the relay, one at the far end, what is in the hands of the copying task.
            await eventually(lambda: sent >= 2 * circuit.WINDOW)
            for _ in range(10):
                text = Text("hi" * 100_000)
                assert await a.call(star.middle.peer_id, ECHO, text, timeout=5) == text
            assert sent <= 2 * circuit.WINDOW + 2 * relay.CHUNK
            nursery.cancel_scope.cancel()
    served.set()


async def test_an_idle_circuit_is_closed(star: Star, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(relay, "IDLE_TIMEOUT", 0.2)
    a, b = await star.member(), await star.member()
    monkeypatch.setitem(b._host.handlers, STOP, _accept_and_say_nothing)
    async with hop(link(a, star.middle), connect(b.peer_id)) as (status, stream):
        assert status == Status.OK
        with trio.fail_after(5), pytest.raises(StreamClosed):
            await stream.read_exactly(1)
    await eventually(lambda: star.circuits == 0)


async def _accept_and_say_nothing(_connection: Connection, stream: YamuxStream) -> None:
    await read_message(stream, StopMessage)
    await write_message(stream, StopMessage(type=StopMessage.STATUS, status=Status.OK))
    await stream.read_exactly(1)


async def test_a_target_that_does_not_answer_costs_a_deadline(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(relay, "HANDSHAKE_TIMEOUT", 0.2)
    a, b = await star.member(), await star.member()

    async def silent(_connection: Connection, stream: YamuxStream) -> None:
        await stream.read_exactly(1 << 20)

    monkeypatch.setitem(b._host.handlers, STOP, silent)
    async with hop(link(a, star.middle), connect(b.peer_id)) as (status, _):
        assert status == Status.CONNECTION_FAILED
    assert star.circuits == 0


async def test_a_relay_that_dies_is_replaced_by_another(star: Star) -> None:
    other = await star.nodes.start(star.middle, relay=True)
    a, b = await star.joined()
    for node in (a, b):
        node.learn(other.peer_id, other.addresses())
        assert (await node.call(other.peer_id, ECHO, Text("hi"), timeout=5)).text == "hi"
        node.use_relays(frozenset({star.middle.peer_id, other.peer_id}))
    first = a.route_of(b.peer_id)
    assert first
    assert first.relay == star.middle.peer_id
    await star.nodes.stop(star.middle)

    def again() -> bool:
        route = a.route_of(b.peer_id)
        return route is not None and route.relay == other.peer_id

    await eventually(again)
    assert (await a.call(b.peer_id, ECHO, Text("hi"), timeout=10)).text == "hi"


async def test_a_direct_connection_replaces_the_relay_and_loses_nothing(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pxd.p2p.sessions.SURPLUS_GRACE", 0.1)
    monkeypatch.setattr("pxd.p2p.sessions.SURPLUS_POLL", 0.05)
    monkeypatch.setattr(punch, "FIRST_DELAY", 0.1)
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 0.1)
    a, b = await star.joined()
    answer = trio.Event()
    bodies: list[bytes] = []

    async def slow(_peer: str, request: Text) -> Text:
        await answer.wait()
        return request

    async def take(_peer: str, _frame: wire.Frame, body: wire.Buffer) -> None:
        await trio.lowlevel.checkpoint()
        bodies.append(bytes(body))

    slow_echo = type(ECHO)("test.slow", Text, Text)
    for node in (a, b):
        node.serve(slow_echo, slow)
        node.on_frame(take)
    texts: list[str] = []

    async def call(one: Libp2pNetwork, other: Libp2pNetwork) -> None:
        texts.append((await one.call(other.peer_id, slow_echo, Text("slow"), timeout=20)).text)

    relayed = {link(a, b), link(b, a)}
    step = wire.Step(pipeline="p", session=1, step=1, rows=(), tensor=wire.Tensor("i32", (1,)))
    async with trio.open_nursery() as nursery:
        nursery.start_soon(call, a, b)
        nursery.start_soon(call, b, a)
        for number in range(200):
            await a.send(b.peer_id, step, number.to_bytes(4, "little"))
            if number == 100:
                # From now on there is an address to try.
                a.learn(b.peer_id, b.addresses())
                await eventually(lambda: not a.relayed() and not b.relayed())
        await eventually(lambda: len(bodies) == 200)
        assert not any(connection.muxer.closed.is_set() for connection in relayed)
        answer.set()
    assert texts == ["slow", "slow"]
    assert bodies == [number.to_bytes(4, "little") for number in range(200)]
    await eventually(lambda: star.circuits == 0)
    assert all(connection.muxer.closed.is_set() for connection in relayed)
    assert (await a.call(b.peer_id, ECHO, Text("direct"), timeout=5)).text == "direct"
