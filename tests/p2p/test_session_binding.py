"""The proof belongs to one Noise session: nobody in the middle can use somebody else's."""

from collections.abc import Awaitable, Callable

import pytest
import trio

from pxd.identity import Keyring
from pxd.p2p import host, keyproof
from pxd.p2p.addresses import Address
from pxd.p2p.admission import Admission
from pxd.p2p.host import DialFailed
from pxd.p2p.keyproof import KeyProof
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed, Yamux, YamuxStream
from pxd.p2p.secure import Identity, NoiseConnection, answer, select
from tests.p2p.nodes import KEY, Nodes

Handler = Callable[[YamuxStream], Awaitable[None]]


def port_of(network: Libp2pNetwork) -> int:
    return int(network.addresses()[0].split("/")[4])


async def noise_pair(a: Identity, b: Identity) -> tuple[NoiseConnection, NoiseConnection]:
    """Two ends of a fresh Noise session over a real socket; `a` dialled."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    ends: list[NoiseConnection] = []

    async def accept() -> None:
        ends.append(await b.secure_inbound(await listener.accept()))

    async with listener, trio.open_nursery() as nursery:
        nursery.start_soon(accept)
        stream = await trio.open_tcp_stream("127.0.0.1", listener.socket.getsockname()[1])
        ends.append(await a.secure_outbound(stream, b.peer_id))
        while len(ends) < 2:
            await trio.lowlevel.checkpoint()
    return (ends[0], ends[1]) if ends[0].peer == b.peer_id else (ends[1], ends[0])


async def test_both_ends_and_no_other_session_have_the_same_handshake_hash() -> None:
    """Fails if libp2p should no longer say what its Noise handshake has come to."""
    a, b = Identity(b"a" * 32), Identity(b"b" * 32)
    hashes = []
    for _ in range(2):
        dialled, accepted = await noise_pair(a, b)
        assert (dialled.peer, accepted.peer) == (b.peer_id, a.peer_id)
        assert dialled.binding == accepted.binding
        assert len(dialled.binding) == 32
        hashes.append(dialled.binding)
        dialled.abort()
        accepted.abort()
    assert hashes[0] != hashes[1]


async def test_without_a_handshake_hash_there_is_no_connection(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a, b = await nodes.start(), await nodes.start()
    monkeypatch.setattr("noise.connection.NoiseConnection.get_handshake_hash", lambda self: None)
    with pytest.raises(DialFailed):
        await b._host.dial(Address("127.0.0.1", port_of(a), a.peer_id))
    assert not a.peers()


class Middle:
    """Ends Noise on both sides and passes every byte of the key proof on, both ways."""

    def __init__(self, facing_victim: Identity, facing_member: Identity, member: Address) -> None:
        self._facing_victim = facing_victim
        self._facing_member = facing_member
        self._member = member
        self.passed = bytearray()

    async def serve(self, socket: trio.SocketStream) -> None:
        secured = await self._facing_victim.secure_inbound(socket)
        async with trio.open_nursery() as nursery:
            await Yamux(secured, initiator=False).run(self._on_stream(nursery))
            nursery.cancel_scope.cancel()

    def _on_stream(self, nursery: trio.Nursery) -> Handler:
        async def relay(stream: YamuxStream) -> None:
            await answer([keyproof.PROTOCOL], stream)
            socket = await trio.open_tcp_stream(self._member.host, self._member.port)
            secured = await self._facing_member.secure_outbound(socket, self._member.peer)
            muxer = Yamux(secured, initiator=True)
            nursery.start_soon(muxer.run, self._ignore)
            onward = muxer.open_stream()
            await select([keyproof.PROTOCOL], onward)
            async with trio.open_nursery() as both:
                both.start_soon(self._pass_on, stream, onward)
                both.start_soon(self._pass_on, onward, stream)

        return relay

    async def _ignore(self, stream: YamuxStream) -> None:
        stream.reset()

    async def _pass_on(self, source: YamuxStream, target: YamuxStream) -> None:
        try:
            while data := await source.read_some(4096):
                self.passed += data
                await target.write(data)
        except StreamClosed:
            target.reset()


@pytest.mark.parametrize("stolen", [False, True], ids=["its own identity", "stolen identities"])
async def test_a_man_in_the_middle_gets_nothing_from_passing_proofs_on(
    nodes: Nodes, stolen: bool
) -> None:
    """Even with the node keys of both ends, but not the cluster key, the sessions are two."""
    victim, member = await nodes.start(seed=1), await nodes.start(seed=2)
    as_member = Identity(bytes([2]) * 32 if stolen else b"m" * 32)
    as_victim = Identity(bytes([1]) * 32 if stolen else b"m" * 32)
    assert (as_member.peer_id == member.peer_id) is stolen
    there = Address("127.0.0.1", port_of(member), member.peer_id)
    middle = Middle(as_member, as_victim, there)
    async with trio.open_nursery() as nursery:
        listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
        nursery.start_soon(trio.serve_listeners, middle.serve, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(DialFailed) as failure:
            await victim._host.dial(Address("127.0.0.1", port, as_member.peer_id))
        nursery.cancel_scope.cancel()
    # Two hellos and the dialer's proof went through, and the member found the proof wrong.
    assert failure.value.reason == "wrong-key"
    assert bytes(middle.passed[-8:]) == b"wrongkey"
    assert [refusal.reason for refusal in member.refusals()] == ["wrong-key"]
    assert not member.peers() | victim.peers()


async def test_the_same_proof_in_another_session_of_the_same_two_peers_is_refused(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Even if the nonces came out the same, which only this test can bring about."""
    member = await nodes.start(seed=2)
    identity = Identity(b"s" * 32)
    fixed = keyproof.Hello(bytes(32), bytes(16))
    monkeypatch.setattr(keyproof.Hello, "fresh", lambda instance: fixed)
    proof = KeyProof(Admission(Keyring.first(KEY)), identity.peer_id)
    sent: list[bytes] = []

    async def connect(nursery: trio.Nursery) -> tuple[YamuxStream, bytes]:
        socket = await trio.open_tcp_stream("127.0.0.1", port_of(member))
        secured = await identity.secure_outbound(socket, member.peer_id)
        muxer = Yamux(secured, initiator=True)
        nursery.start_soon(muxer.run, lambda stream: trio.lowlevel.checkpoint())
        stream = muxer.open_stream()
        await select([keyproof.PROTOCOL], stream)
        return stream, secured.binding

    async with trio.open_nursery() as nursery:
        stream, binding = await connect(nursery)
        write = stream.write

        async def record(data: bytes) -> None:
            sent.append(bytes(data))
            await write(data)

        monkeypatch.setattr(stream, "write", record)
        await proof.dial(stream, member.peer_id, binding)
        again, other = await connect(nursery)
        assert other != binding
        for data in sent:
            await again.write(data)
        await again.read_exactly(len(fixed.encode()))
        assert bytes(await again.read_exactly(8)) == b"wrongkey"
        nursery.cancel_scope.cancel()


@pytest.mark.parametrize("stage", ["multistream", "noise", "proof"])
async def test_bytes_dribbled_in_do_not_extend_the_deadline(
    nodes: Nodes, stage: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A slow loris is cut off when its time is over, however busy it looks."""
    monkeypatch.setattr(host, "ADMISSION_TIMEOUT", 0.3)
    a = await nodes.start()
    socket = await trio.open_tcp_stream("127.0.0.1", port_of(a))
    async with trio.open_nursery() as nursery:
        write = socket.send_all
        if stage == "noise":
            await socket.send_all(b"\x13/multistream/1.0.0\n\x07/noise\n\x00\x20")
        if stage == "proof":
            secured = await Identity(b"s" * 32).secure_outbound(socket, a.peer_id)
            muxer = Yamux(secured, initiator=True)
            nursery.start_soon(muxer.run, lambda stream: trio.lowlevel.checkpoint())
            stream = muxer.open_stream()
            await select([keyproof.PROTOCOL], stream)
            write = stream.write  # type: ignore[assignment]
        dribbled = 0
        with trio.fail_after(10):
            try:
                while True:
                    await write(b"/" if dribbled else b"\x13")
                    dribbled += 1
                    await trio.sleep(0.05)
            except (trio.BrokenResourceError, StreamClosed):
                pass
        nursery.cancel_scope.cancel()
    # Nothing it said was wrong yet: every stage waits for 18 bytes or more.
    assert 1 < dribbled < 15
    assert not len(a._host._pending)
    await socket.aclose()
