"""A member that holds the key and still sends nonsense costs itself a stream, and nobody else."""

import contextlib
from collections.abc import Callable

import msgspec
import pytest
import trio

from pxd import wire
from pxd.cluster.messages import LAST_COUNT, Claim, Delta, News, SignedRecord
from pxd.cluster.plans import Epoch
from pxd.cluster.records import ModelChoice, NodeRecord
from pxd.cluster.signing import goodbye, seal
from pxd.p2p import channels, rpc
from pxd.p2p.gossip import GOSSIP, Gossip
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.network import CallFailed
from pxd.p2p.signatures import NodeSigner
from tests.p2p.nodes import ECHO, Nodes, Text, eventually
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


class Trio:
    """`a` and `b` gossip; the member `bad` says what it likes. Seeds are 1, 2 and 3."""

    def __init__(self, gossip: dict[str, Gossip], bad: Libp2pNetwork, a: str, b: str) -> None:
        self.bad, self.a, self.b = bad, a, b
        self.at_a, self.at_b = gossip[a], gossip[b]

    async def say(self, *records: SignedRecord, claims: tuple[Claim, ...] = ()) -> None:
        message = Delta(news=News(records, claims))
        await self.bad.call(self.a, GOSSIP, message, timeout=5)


def signer(seed: int) -> NodeSigner:
    return NodeSigner(bytes([seed]) * 32)


@pytest.fixture
async def three(nodes: Nodes, nursery: trio.Nursery) -> Trio:
    a = await nodes.start()
    b = await nodes.start(a)
    gossips: dict[str, Gossip] = {}
    for seed, network in ((1, a), (2, b)):
        record = NodeRecord(
            id=network.peer_id, name=f"n{seed}", incarnation=1, addresses=network.addresses()
        )
        gossip = gossips[network.peer_id] = Gossip(
            network,
            record,
            signer=signer(seed),
            seed=seed,
            term=0,
            expects_peers=seed > 1,
            persist=forget,
        )
        await nursery.start(gossip.run)
    bad = await nodes.start(a, b)
    together = Trio(gossips, bad, a.peer_id, b.peer_id)
    await eventually(lambda: together.b in together.at_a.members)
    await eventually(lambda: together.a in together.at_b.members)
    return together


async def forget(incarnation: int, term: int) -> None:
    pass


Forgery = Callable[[NodeRecord, str], SignedRecord]
FORGERIES: dict[str, Forgery] = {
    "own signature": lambda record, bad: seal(
        msgspec.structs.replace(record, incarnation=9, memory=666), signer(3)
    ),
    "own name outside": lambda record, bad: msgspec.structs.replace(
        seal(msgspec.structs.replace(record, incarnation=9, memory=666), signer(3)), node=bad
    ),
    "content replaced": lambda record, bad: msgspec.structs.replace(
        seal(record, signer(2)),
        version=record.version + 9,
        content=msgspec.msgpack.encode(
            msgspec.structs.replace(record, version=record.version + 9, memory=666)
        ),
    ),
    "no peer id": lambda record, bad: seal(
        msgspec.structs.replace(record, id="b", memory=666), signer(3)
    ),
}


@pytest.mark.parametrize("forgery", FORGERIES.values(), ids=FORGERIES)
async def test_another_ones_record_cannot_be_claimed(three: Trio, forgery: Forgery) -> None:
    forged = forgery(three.at_b.record, three.bad.peer_id)
    before = set(three.at_a.members)
    await three.say(forged)
    assert set(three.at_a.members) == before
    assert three.at_a.members[three.b].record.memory == 0
    assert three.at_a.members[three.b].record.incarnation < 9
    await three.say(seal(NodeRecord(id=three.bad.peer_id, name="bad", memory=7), signer(3)))
    assert three.at_a.members[three.bad.peer_id].record.memory == 7, "its own is its own affair"


async def test_an_old_record_of_another_one_is_no_news(three: Trio) -> None:
    old = seal(three.at_b.record, signer(2))
    three.at_b.update(memory=5)
    await eventually(lambda: three.at_a.members[three.b].record.memory == 5)
    await three.say(old)
    assert three.at_a.members[three.b].record.memory == 5


async def test_another_ones_goodbye_cannot_be_said(three: Trio) -> None:
    life = three.at_b.record.incarnation
    for proof in (b"", b"x" * 64, goodbye(three.b, life, signer(3))):
        await three.say(claims=(Claim(three.b, "left", life, three.b, proof),))
    assert three.at_a.members[three.b].state == "alive"
    await three.at_b.leave(5)
    assert three.at_a.members[three.b].state == "left"


async def test_a_node_does_not_count_up_to_an_absurd_term(three: Trio) -> None:
    """With a step for each change of its own record, it would do nothing else for hours."""
    await eventually(lambda: three.at_a.leader is not None)
    record = NodeRecord(
        id=three.bad.peer_id,
        name="bad",
        seniority=LAST_COUNT,
        term=LAST_COUNT,
        leads=LAST_COUNT,
        plan=Epoch(LAST_COUNT, three.bad.peer_id, LAST_COUNT),
        choice=ModelChoice(LAST_COUNT, "zzz", ("bad",)),
    )
    with trio.fail_after(10):
        await three.say(seal(record, signer(3)))
        await eventually(lambda: three.bad.peer_id in three.at_b.members)
    assert three.at_a.term < 100
    assert three.at_b.term < 100


async def test_nobody_is_made_to_count_to_the_end(three: Trio) -> None:
    claims = tuple(
        Claim(three.a, state, LAST_COUNT, three.bad.peer_id)
        for state in ("suspect", "dead", "left")
    )
    await three.say(claims=claims)
    assert three.at_a.record.incarnation == 1
