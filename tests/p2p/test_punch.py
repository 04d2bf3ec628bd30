"""Hole punching where nothing is to be punched: what is told, and what is not put up with."""

import contextlib
import math

import pytest
import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from pxd.p2p import circuit, observed, punch
from pxd.p2p.circuit import write_message
from pxd.p2p.muxer import StreamClosed
from tests.p2p.nodes import ECHO, Text, eventually
from tests.p2p.star import Star, link


async def test_garbage_instead_of_hole_punching_leaves_the_relayed_connection(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 0.05)
    monkeypatch.setattr(punch, "REST", 0.05)
    a, b = await star.joined()
    for one, other, messages in (
        (b, a, [b"\x05\xff\xff\xff\xff\xff"]),
        (b, a, [HolePunch(type=HolePunch.SYNC)]),
        (b, a, [HolePunch(type=HolePunch.CONNECT), HolePunch(type=HolePunch.CONNECT)]),
        (a, b, [HolePunch(type=HolePunch.CONNECT)]),
    ):
        await eventually(lambda: a._upgrades is not None and a._upgrades._due(b.peer_id))
        stream = await link(one, other).open_stream(punch.PROTOCOL)
        with contextlib.suppress(StreamClosed):
            for message in messages:
                if isinstance(message, bytes):
                    await stream.write(message)
                else:
                    await write_message(stream, message)
        with trio.fail_after(5), pytest.raises(StreamClosed):
            await stream.read_exactly(circuit.MESSAGE_LIMIT)
    assert (await a.call(b.peer_id, ECHO, Text("still"), timeout=5)).text == "still"
    assert a.relayed() == {b.peer_id}


async def test_hole_punching_cannot_be_asked_for_all_the_time(
    star: Star, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 0.05)
    monkeypatch.setattr(punch, "REST", 1000.0)
    a, b = await star.joined()
    assert a._upgrades
    upgrades = a._upgrades
    await eventually(lambda: not upgrades._due(b.peer_id))
    await eventually(lambda: upgrades._served[b.peer_id] < math.inf)
    stream = await link(b, a).open_stream(punch.PROTOCOL)
    with trio.fail_after(5), pytest.raises(StreamClosed):
        await stream.read_exactly(1)


async def test_an_address_is_told_as_it_is_seen(star: Star) -> None:
    a = await star.member()
    seen = await observed.ask(link(a, star.middle))
    there = link(star.middle, a)
    assert seen == (there.host, int(there.address.rpartition(":")[2]))


@pytest.mark.parametrize("endpoint", [("192.0.2.1", 1), ("2001:db8::7", 65535)])
def test_endpoints_as_multiaddrs(endpoint: tuple[str, int]) -> None:
    assert observed.decode_endpoint(observed.encode_endpoint(endpoint)) == endpoint


def test_an_ipv4_address_in_ipv6_is_an_ipv4_address() -> None:
    data = observed.encode_endpoint(("::ffff:192.0.2.1", 5))
    assert observed.decode_endpoint(data) == ("192.0.2.1", 5)


def test_only_a_few_endpoints_that_may_be_dialled_are_taken() -> None:
    good = [observed.encode_endpoint((f"192.0.2.{n}", 1)) for n in range(9)]
    bad = [b"", b"\x04\x01", observed.encode_endpoint(("127.0.0.1", 1)), b"\xff" * 100]
    message = HolePunch(type=HolePunch.CONNECT, ObsAddrs=[*bad[:3], *good])
    assert punch.endpoints_in(message) == [("192.0.2.0", 1)]
