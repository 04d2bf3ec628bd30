"""Multicast discovery: who recognises whom, and two real nodes that know nothing of each other."""

import contextlib
import socket
import struct

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from zeroconf import IPVersion, ServiceInfo

from pxd.p2p import mdns
from pxd.p2p.mdns import SERVICE, Heard, badge, read_announcement
from tests.p2p.nodes import ECHO, KEY, Nodes, Text, connected, eventually

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"


def announcement(properties: dict[str, str], hosts: list[str], port: int = 8471) -> ServiceInfo:
    return ServiceInfo(
        SERVICE, f"x.{SERVICE}", port=port, parsed_addresses=hosts, properties=properties
    )


def test_members_recognise_each_other_and_nobody_else_does() -> None:
    info = announcement({"id": PEER, "badge": badge(KEY, PEER)}, ["192.0.2.7", "fe80::1"])
    found = read_announcement(info, KEY)
    assert (found.kind, found.peer) == ("member", PEER)
    assert {str(address) for address in found.addresses} == {
        f"/ip4/192.0.2.7/tcp/8471/p2p/{PEER}",
        f"/ip6/fe80::1/tcp/8471/p2p/{PEER}",
    }
    assert read_announcement(info, b"x" * 32) == Heard("stranger", PEER, found.addresses)
    # Around a change of the cluster key some announce with the old one, some with the new one.
    assert read_announcement(info, b"x" * 32, KEY) == found
    stolen = announcement({"id": PEER + "x", "badge": badge(KEY, PEER)}, ["192.0.2.7"])
    assert read_announcement(stolen, KEY).kind == "stranger"


@given(
    st.dictionaries(st.sampled_from(["id", "badge", "other"]), st.text(max_size=40)),
    st.integers(0, 65535),
)
def test_nonsense_is_ignored_or_a_value_error(properties: dict[str, str], port: int) -> None:
    info = announcement(properties, ["192.0.2.7"], port)
    with contextlib.suppress(ValueError):
        assert read_announcement(info, KEY).kind == "stranger"


def multicast_problem() -> str:
    """Why a datagram to the mDNS group does not come back on loopback; "" when it does."""
    group = "224.0.0.251"
    try:
        with (
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver,
            socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender,
        ):
            receiver.settimeout(1)
            receiver.bind(("", 0))
            membership = struct.pack("4s4s", socket.inet_aton(group), socket.inet_aton("127.0.0.1"))
            receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, membership)
            sender.setsockopt(
                socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1")
            )
            sender.sendto(b"ping", (group, receiver.getsockname()[1]))
            receiver.recv(10)
    except OSError as error:
        return str(error)
    return ""


async def test_nodes_on_one_network_find_each_other(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    if problem := multicast_problem():
        pytest.skip(f"no multicast on this machine: {problem}")
    a, b = await nodes.start(mdns=True), await nodes.start(mdns=True)
    stranger = await nodes.start(mdns=True, key=b"x" * 32)
    await connected(a, b)
    assert await a.call(b.peer_id, ECHO, Text("found you"), timeout=5) == Text("found you")
    assert not stranger.peers()
    await eventually(lambda: bool(stranger.discovery().foreign))
    await eventually(lambda: caplog.text.count("another cluster key") == 3)
    # They do not even try each other's doors.
    assert not stranger.refusals()
    assert not [refusal for refusal in a.refusals() if refusal.peer == stranger.peer_id]


@pytest.mark.parametrize(
    ("dual_stack", "hosts", "version", "used"),
    [
        (True, ["192.0.2.7", "fe80::1"], IPVersion.All, ["192.0.2.7", "fe80::1"]),
        (False, ["192.0.2.7", "fe80::1"], IPVersion.V4Only, ["192.0.2.7"]),
        (True, ["192.0.2.7"], IPVersion.V4Only, ["192.0.2.7"]),
        (False, ["fe80::1", "fe80::2"], IPVersion.V6Only, ["fe80::1", "fe80::2"]),
    ],
)
def test_ipv6_never_costs_ipv4_where_a_socket_cannot_do_both(
    monkeypatch: pytest.MonkeyPatch,
    dual_stack: bool,
    hosts: list[str],
    version: IPVersion,
    used: list[str],
) -> None:
    opened: list[dict[str, object]] = []
    monkeypatch.setattr(mdns, "DUAL_STACK", dual_stack)
    monkeypatch.setattr("zeroconf.Zeroconf", lambda **options: opened.append(options))
    mdns.Mdns(PEER, lambda: (KEY,), 8471, hosts, hosts)._open()
    assert [(each["ip_version"], each["interfaces"]) for each in opened] == [(version, used)]


async def test_without_multicast_the_node_runs_and_says_so(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(**options: object) -> None:
        raise OSError("no multicast here")

    monkeypatch.setattr("zeroconf.Zeroconf", fail)
    a = await nodes.start(mdns=True)
    with trio.fail_after(10):
        while "no multicast here" not in caplog.text:
            await trio.sleep(0.01)
    assert "--join" in caplog.text
    assert await a.call(a.peer_id, ECHO, Text("fine"), timeout=5)
