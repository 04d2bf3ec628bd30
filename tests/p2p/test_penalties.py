"""Whom failed admissions make a nuisance, for how long, and whom they must not shut out."""

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pxd.p2p import host as host_module
from pxd.p2p import penalties as penalties_module
from pxd.p2p.addresses import Address
from pxd.p2p.host import DialFailed
from pxd.p2p.keyproof import KeyProof
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.penalties import BURST, PER_SECOND, TRUSTED_BURST, TRUSTED_FOR, Penalties
from tests.p2p.nodes import ECHO, Nodes, Text, eventually

HOST, OTHER = "192.0.2.7", "192.0.2.8"


def fail(penalties: Penalties, host: str, times: float, now: float = 0.0) -> None:
    for _ in range(int(times)):
        penalties.failed(host, now)


def test_a_stranger_has_some_tries_and_gets_them_back_slowly() -> None:
    penalties = Penalties()
    fail(penalties, HOST, BURST - 1)
    assert penalties.allows(HOST, 0)
    penalties.failed(HOST, 0)
    assert not penalties.allows(HOST, 0)
    assert penalties.allows(OTHER, 0)
    assert not penalties.allows(HOST, 0.9 / PER_SECOND)
    assert penalties.allows(HOST, 1.1 / PER_SECOND)
    fail(penalties, HOST, 1000, 10.0)
    # However often it failed, it owes no more than one token's time.
    assert penalties.allows(HOST, 10.0 + 1.1 / PER_SECOND)


def test_where_a_member_got_in_far_more_may_fail() -> None:
    penalties = Penalties()
    fail(penalties, HOST, BURST)
    penalties.admitted(HOST, 0)
    fail(penalties, HOST, TRUSTED_BURST - 1)
    assert penalties.allows(HOST, 0)
    penalties.failed(HOST, 0)
    assert not penalties.allows(HOST, 0)
    # A member behind the same router is let in again within a moment.
    assert penalties.allows(HOST, 0.1)
    # Being let in again does not fill the bucket, so a member cannot pay for a flood.
    fail(penalties, HOST, TRUSTED_BURST)
    penalties.admitted(HOST, 0)
    assert not penalties.allows(HOST, 0)
    fail(penalties, HOST, BURST, TRUSTED_FOR + 1)
    assert not penalties.allows(HOST, TRUSTED_FOR + 1)


def test_a_whole_ipv6_network_is_one_subscriber_and_a_link_is_not() -> None:
    penalties = Penalties()
    fail(penalties, "2001:db8:1:2::1", BURST)
    assert not penalties.allows("2001:db8:1:2:ffff::9", 0)
    assert penalties.allows("2001:db8:1:3::1", 0)
    fail(penalties, "fe80::1%eth0", BURST)
    assert not penalties.allows("fe80::1%eth0", 0)
    assert penalties.allows("fe80::2%eth0", 0)
    fail(penalties, "::ffff:192.0.2.7", BURST)
    assert not penalties.allows(HOST, 0)


def test_the_table_is_bounded_and_members_addresses_stay_longest() -> None:
    penalties = Penalties(capacity=100)
    penalties.admitted(HOST, 0)
    fail(penalties, HOST, BURST)
    for number in range(1000):
        penalties.failed(f"198.51.{number // 250}.{number % 250}", 0)
        assert len(penalties) <= 100
    fail(penalties, HOST, TRUSTED_BURST - BURST - 1)
    assert penalties.allows(HOST, 0)
    penalties.failed(HOST, 0)
    assert not penalties.allows(HOST, 0)
    members = Penalties(capacity=3)
    for number in range(9):
        members.admitted(f"198.51.100.{number}", 0)
    assert len(members) == 3


@given(st.lists(st.tuples(st.sampled_from("fao"), st.floats(0, 100)), max_size=200))
def test_nobody_is_shut_out_for_longer_than_a_token_takes(steps: list[tuple[str, float]]) -> None:
    penalties, now = Penalties(), 0.0
    for step, pause in steps:
        now += pause
        if step == "f":
            penalties.failed(HOST, now)
        elif step == "a":
            penalties.admitted(HOST, now)
        assert penalties.allows(HOST, now) or penalties.allows(HOST, now + 1.01 / PER_SECOND)


def knock(victim: Libp2pNetwork) -> Address:
    port = int(victim.addresses()[0].split("/")[4])
    return Address("127.0.0.1", port, victim.peer_id)


async def test_wrong_proofs_close_the_door_before_noise_and_members_get_in(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalties_module, "BURST", 3.0)
    monkeypatch.setattr(penalties_module, "PER_SECOND", 0.0)
    monkeypatch.setattr(penalties_module, "TRUSTED_BURST", 6.0)
    monkeypatch.setattr(penalties_module, "TRUSTED_PER_SECOND", 0.0)
    handshakes = 0
    inbound = host_module.Identity.secure_inbound

    async def count(self: host_module.Identity, stream: trio.SocketStream) -> object:
        nonlocal handshakes
        handshakes += 1
        return await inbound(self, stream)

    a = await nodes.start()
    stranger = await nodes.start(key=b"x" * 32)
    monkeypatch.setattr(host_module.Identity, "secure_inbound", count)
    reasons = []
    for _ in range(6):
        with pytest.raises(DialFailed) as failure:
            await stranger._host.dial(knock(a))
        reasons.append(failure.value.reason)
    assert reasons == ["wrong-key"] * 3 + ["not-pxd"] * 3
    assert handshakes == 3
    assert {refusal.reason for refusal in a.refusals()} == {"wrong-key", "too-many-failures"}
    # What a dials itself is not affected, so a member gets in all the same; and then vouches.
    member = await nodes.start()
    a.learn(member.peer_id, member.addresses())
    assert await a.call(member.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")


async def test_a_member_s_address_is_forgiven_when_it_gets_in(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(penalties_module, "BURST", 3.0)
    monkeypatch.setattr(penalties_module, "PER_SECOND", 0.0)
    a = await nodes.start()
    stranger = await nodes.start(key=b"x" * 32)
    for _ in range(2):
        with pytest.raises(DialFailed):
            await stranger._host.dial(knock(a))
    member = await nodes.start(a)
    for _ in range(5):
        with pytest.raises(DialFailed) as failure:
            await stranger._host.dial(knock(a))
        assert failure.value.reason == "wrong-key"
    assert await member.call(a.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")


async def test_keys_and_bans_take_effect_on_a_running_network(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    assert isinstance(a._host._proof, KeyProof)
    await a.shut_out(frozenset({b.peer_id}))
    assert not a.peers()
    await eventually(lambda: not b.peers())
    b_to_a = [refusal.reason for refusal in b.refusals()]
    for source, target in ((a, b), (b, a)):
        with pytest.raises(DialFailed) as failure:
            await source._host.dial(knock(target))
        assert failure.value.reason == "banned", b_to_a
    failure_at_a = await a._dialer.dial(b.peer_id)  # type: ignore[union-attr]
    assert failure_at_a is not None
    assert failure_at_a.reason == "banned"
    await a.shut_out(frozenset())
    await b._host.dial(knock(a))
    assert a.peers() == {b.peer_id}
