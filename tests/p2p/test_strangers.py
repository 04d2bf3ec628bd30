"""What somebody without the key can do to a node: nothing that keeps members out."""

import contextlib
import random
from pathlib import Path

import pytest
import trio
from libp2p import new_host
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.network.config import ConnectionConfig
from libp2p.peer.peerinfo import info_from_p2p_addr
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.stream_muxer.yamux.yamux import Yamux as StockYamux
from multiaddr import Multiaddr

from pxd.p2p import channels, host, keyproof, rpc
from pxd.p2p.host import DialFailed
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.muxer import StreamClosed, Yamux, YamuxStream
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.pending import PER_ADDRESS
from pxd.p2p.secure import Identity, handshake_hash, select
from tests.p2p.nodes import ECHO, Nodes, Text, connected, eventually


def port_of(network: Libp2pNetwork) -> int:
    return int(network.addresses()[0].split("/")[4])


async def check_answering(nodes: Nodes, a: Libp2pNetwork, member: Libp2pNetwork) -> None:
    """A member of old still gets its answers, and a new one gets in."""
    assert await member.call(a.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")
    newcomer = await nodes.start(a)
    assert await newcomer.call(a.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")
    assert a.peers() == {member.peer_id, newcomer.peer_id}


async def test_two_hundred_connects_and_half_open_sockets(nodes: Nodes) -> None:
    a = await nodes.start()
    member = await nodes.start(a)
    sockets = [await trio.open_tcp_stream("127.0.0.1", port_of(a)) for _ in range(200)]
    await eventually(lambda: len(a._host._pending) == PER_ADDRESS)
    await check_answering(nodes, a, member)
    for stream in sockets:
        await stream.aclose()
    await eventually(lambda: len(a._host._pending) == 0)


@pytest.mark.parametrize("port", ["libp2p", "data"])
async def test_a_megabyte_of_random_bytes(nodes: Nodes, port: str) -> None:
    a = await nodes.start()
    member = await nodes.start(a)
    rng = random.Random(7)
    target = port_of(a) if port == "libp2p" else a._channels._port
    for beginning in (b"", b"\x13/multistream/1.0.0\n", b"\xff" * 9, b"\x16\x03\x01"):
        stream = await trio.open_tcp_stream("127.0.0.1", target)
        try:
            with trio.fail_after(10):
                await stream.send_all(beginning + rng.randbytes(1 << 20))
                while await stream.receive_some():
                    pass
        except trio.BrokenResourceError:
            continue
    await check_answering(nodes, a, member)


async def test_a_connection_without_proof_is_closed(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ADMISSION_TIMEOUT", 0.3)
    a = await nodes.start()
    async with trio.open_nursery() as nursery:
        muxer = await dial_as_stranger(nursery, a)
        with trio.fail_after(10):
            await muxer.closed.wait()
        nursery.cancel_scope.cancel()
    await eventually(lambda: len(a._host._pending) == 0)
    assert not a.peers()


async def dial_as_stranger(nursery: trio.Nursery, victim: Libp2pNetwork) -> Yamux:
    """Noise and Yamux as they should be, and nothing more."""
    stream = await trio.open_tcp_stream("127.0.0.1", port_of(victim))
    secured = await Identity(b"s" * 32).secure_outbound(stream, victim.peer_id)
    muxer = Yamux(secured, initiator=True)

    async def refuse(stream: YamuxStream) -> None:
        stream.reset()

    nursery.start_soon(muxer.run, refuse)
    return muxer


@pytest.mark.parametrize("protocol", [rpc.PROTOCOL, channels.PROTOCOL, "/ipfs/id/1.0.0"])
@pytest.mark.parametrize("proving", [False, True])
async def test_a_stranger_is_offered_no_protocol_of_pxd(
    nodes: Nodes, protocol: str, proving: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(host, "ADMISSION_TIMEOUT", 0.3)
    a = await nodes.start()
    heard = bytearray()
    async with trio.open_nursery() as nursery:
        muxer = await dial_as_stranger(nursery, a)
        if proving:
            await select([keyproof.PROTOCOL], muxer.open_stream())
        stream = muxer.open_stream()
        line = protocol.encode() + b"\n"
        await stream.write(b"\x13/multistream/1.0.0\n" + bytes([len(line)]) + line)
        with trio.fail_after(10), contextlib.suppress(StreamClosed):
            while data := await stream.read_some(1000):
                heard += data
        nursery.cancel_scope.cancel()
    # "na" is "not available"; once the proof has begun, nothing is answered at all.
    assert bytes(heard) == (b"" if proving else b"\x13/multistream/1.0.0\n\x03na\n")


def stock_host(directory: Path) -> object:
    """libp2p's own host, as any other project would use it."""
    keys = create_new_key_pair(b"o" * 32)
    noise = NoiseTransport(keys, noise_privkey=X25519PrivateKey.new())
    return new_host(
        key_pair=keys,
        sec_opt={"/noise": noise},
        muxer_opt={"/yamux/1.0.0": StockYamux},
        connection_config=ConnectionConfig(min_connections=0, low_watermark=0),
    )


async def test_the_wire_is_libp2p_s_and_its_own_host_gets_as_far_as_the_proof(
    nodes: Nodes, tmp_path: Path
) -> None:
    a = await nodes.start()
    other = stock_host(tmp_path)
    hello = keyproof.Hello.fresh(bytes(16)).encode()
    listen = [Multiaddr("/ip4/127.0.0.1/tcp/0")]
    async with other.run(listen_addrs=listen):  # type: ignore[attr-defined]
        with trio.fail_after(20):
            await other.connect(info_from_p2p_addr(Multiaddr(a.addresses()[0])))  # type: ignore[attr-defined]
            target = info_from_p2p_addr(Multiaddr(a.addresses()[0])).peer_id
            stream = await other.new_stream(target, [keyproof.PROTOCOL])  # type: ignore[attr-defined]
            await stream.write(hello)
            theirs = await stream.read(len(hello))
            me = str(other.get_id())  # type: ignore[attr-defined]
            session = handshake_hash(stream.swarm_conn.muxed_conn.secured_conn)
            exchange = keyproof.Exchange(session, me, a.peer_id, hello, theirs)
            await stream.write(b"\x01" + exchange.mac(b"k" * 32, "dialer"))
            assert await stream.read(8) == b"ok......"
            await eventually(lambda: a.peers() == {me})
        await other.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", ["a" * 240, "a..b", ".", "fe80::1%\0", "x\0y", "-" * 64])
async def test_a_host_that_cannot_be_is_unreachable(nodes: Nodes, name: str) -> None:
    """What members say of themselves is dialled, and must not end the node that does so."""
    a, b = await nodes.start(), await nodes.start()
    with pytest.raises(DialFailed) as failure:
        await a._host.dial(host.Address(name, 1, b.peer_id))
    assert failure.value.reason == "unreachable"
    a._book._addresses[b.peer_id] = (host.Address(name, 1, b.peer_id),)
    with pytest.raises(PeerUnreachable):
        await a.call(b.peer_id, ECHO, Text(""), timeout=10)
    other = await nodes.start(a)
    assert await other.call(a.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")


async def test_dialling_something_else_says_what_is_wrong(nodes: Nodes) -> None:
    a, b = await nodes.start(), await nodes.start()
    wrong = host.Address("127.0.0.1", port_of(a), b.peer_id)
    c = await nodes.start()
    with pytest.raises(DialFailed) as failure:
        await c._host.dial(wrong)
    assert failure.value.reason == "other-peer"
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")

    async def babble(stream: trio.SocketStream) -> None:
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    async with trio.open_nursery() as nursery:
        nursery.start_soon(trio.serve_listeners, babble, listeners)
        port = listeners[0].socket.getsockname()[1]
        with pytest.raises(DialFailed) as failure:
            await c._host.dial(host.Address("127.0.0.1", port, b.peer_id))
        nursery.cancel_scope.cancel()
    assert failure.value.reason == "not-pxd"
    assert await connected_with_itself(c)


async def connected_with_itself(network: Libp2pNetwork) -> bool:
    with pytest.raises(DialFailed):
        await network._host.dial(host.Address("127.0.0.1", port_of(network), network.peer_id))
    return not network.peers()


async def test_a_handler_that_fails_costs_one_stream_only(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await nodes.start()
    b = await nodes.start(a)

    async def fail(self: object) -> None:
        raise ZeroDivisionError

    with monkeypatch.context() as patch:
        patch.setattr(rpc.RpcServer, "run", fail)
        with pytest.raises(Exception, match="lost the connection"):
            await b.call(a.peer_id, ECHO, Text("hi"), timeout=5)
    assert await b.call(a.peer_id, ECHO, Text("hi"), timeout=5) == Text("hi")
    await connected(a, b)
