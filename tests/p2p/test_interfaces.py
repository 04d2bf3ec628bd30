"""Which addresses a machine tells, which way to a peer is tried first, what counts as a move."""

import socket

import psutil
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.p2p.addresses import Address
from pxd.p2p.interfaces import Local, Medium, local_addresses, reachable_hosts
from pxd.p2p.neighbours import interfaces_to_use
from pxd.p2p.roaming import INTERVAL, SLEPT, Moved, Watch
from pxd.p2p.routes import ROUTES, ZONES, nearness, routes

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
V4, V6 = socket.AF_INET, socket.AF_INET6

INTERFACES = {
    "lo": [(V4, "127.0.0.1", "255.0.0.0"), (V6, "::1", None)],
    "lo0": [(V6, "fe80::1%lo0", "ffff:ffff:ffff:ffff::")],
    "docker0": [(V4, "172.17.0.1", "255.255.0.0")],
    "veth1a2b3c": [(V6, "fe80::5%veth1a2b3c", "ffff:ffff:ffff:ffff::")],
    "wlan0": [(V4, "198.51.100.7", "255.255.255.0"), (V6, "fe80::7%wlan0", None)],
    "eth0": [
        (V4, "192.0.2.7", "255.255.255.0"),
        *((V6, f"2001:db8::{n}", "ffff:ffff:ffff:ffff::") for n in range(1, 5)),
        (V6, "fe80::8%eth0", "ffff:ffff:ffff:ffff::%eth0"),
    ],
    "eth1": [(V4, "203.0.113.7", "255.255.255.0")],
    "bridge0": [(V4, "169.254.9.9", "255.255.0.0"), (V6, "fe80::9%bridge0", None)],
    "utun3": [(V4, "100.64.0.7", "255.255.255.255"), (V6, "fe80::a%utun3", None)],
}


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> tuple[Local, ...]:
    def stats(name: str) -> object:
        speed = 2500 if name == "eth0" else 0
        return psutil._ntuples.snicstats(name != "eth1", 2, speed, 1500, "")

    found = {
        name: [psutil._ntuples.snicaddr(f, text, mask, None, None) for f, text, mask in addresses]
        for name, addresses in INTERFACES.items()
    }
    monkeypatch.setattr(psutil, "net_if_addrs", lambda: found)
    monkeypatch.setattr(psutil, "net_if_stats", lambda: {name: stats(name) for name in found})
    return local_addresses()


def test_a_wildcard_stands_for_what_others_may_reach(here: tuple[Local, ...]) -> None:
    v4 = ["198.51.100.7", "192.0.2.7", "169.254.9.9", "100.64.0.7"]
    v6 = ["2001:db8::1", "2001:db8::2", "fe80::7", "fe80::8", "fe80::9"]
    assert reachable_hosts(["0.0.0.0"], here) == v4
    assert reachable_hosts(["::"], here) == v6
    both = reachable_hosts(["0.0.0.0", "::"], here)
    assert sorted(both) == sorted(v4 + v6)
    # What is likely to work for others first; a tunnel last.
    assert both[:4] == [*v4[:2], *v6[:2]]
    assert both[-1] == "100.64.0.7"
    assert reachable_hosts(["127.0.0.1"], here) == ["127.0.0.1"]
    assert reachable_hosts(["192.0.2.7", "192.0.2.7"], here) == ["192.0.2.7"]
    alone = [local for local in here if local.interface in ("lo", "docker0")]
    assert reachable_hosts(["0.0.0.0", "::"], alone) == ["127.0.0.1"]
    assert reachable_hosts(["::"], alone) == ["::1"]


def test_multicast_is_spoken_once_per_interface(here: tuple[Local, ...]) -> None:
    told = reachable_hosts(["0.0.0.0", "::"], here)
    spoken = interfaces_to_use(told, here)
    assert {host for host in spoken if ":" not in host} == {host for host in told if "." in host}
    assert [host for host in spoken if ":" in host] == ["2001:db8::1", "fe80::7", "fe80::9"]


def _at(*hosts: str) -> list[Address]:
    return [Address(host, 8471, PEER) for host in hosts]


def test_the_fastest_direct_way_is_tried_first(here: tuple[Local, ...]) -> None:
    told = _at("10.0.0.1", "198.51.100.9", "fe80::1", "203.0.113.9", "192.0.2.9", "169.254.1.2")
    assert [address.host for address in routes(told, here)] == [
        "169.254.1.2",
        "fe80::1%bridge0",
        "192.0.2.9",
        "fe80::1%eth0",
        "198.51.100.9",
        "fe80::1%wlan0",
        # Beyond a router, what worked last still first; the interface of the last one is down.
        "10.0.0.1",
        "203.0.113.9",
    ]


def test_what_cannot_be_dialled_directly_comes_last_and_without_a_zone_not_at_all() -> None:
    wired = [Local("192.0.2.7", "eth0", "192.0.2.0/24")]
    told = _at("169.254.1.2", "fe80::1", "desk.example", "10.0.0.1")
    assert [a.host for a in routes(told, wired)] == ["desk.example", "10.0.0.1", "169.254.1.2"]


@given(st.lists(st.ip_addresses(), max_size=16), st.integers(0, 12))
def test_routes_are_bounded_and_each_is_somewhere_that_was_told(
    told: list[object], count: int
) -> None:
    among = [Local("fe80::1", f"eth{n}", "fe80::/64", Medium.WIRED, n) for n in range(count)]
    addresses = _at(*map(str, told), "fe80::2")
    ways = routes(addresses, among)
    assert len(ways) <= ROUTES
    assert {way.without_zone() for way in ways} <= set(addresses)
    zones = [way.host for way in ways if way.host.startswith("fe80::2%")]
    assert len(set(zones)) == min(count, ZONES) == len(zones)


def test_a_cable_is_nearer_than_the_air_and_a_name_is_nowhere(here: tuple[Local, ...]) -> None:
    ways = ("fe80::1%bridge0", "192.0.2.9", "198.51.100.9", "10.0.0.1")
    ranks = [nearness(host, here) for host in ways]
    assert ranks == sorted(set(ranks))  # type: ignore[type-var]
    assert nearness("fe80::1%eth0", here) == nearness("192.0.2.9", here)
    assert nearness("relay.example", here) is None


def test_a_move_is_a_change_of_addresses_or_a_look_that_comes_late() -> None:
    one, two = frozenset({"192.0.2.1"}), frozenset({"192.0.2.2"})
    watch = Watch(100.0, 5000.0, one)
    assert watch.look(101.0, 5001.0, one) is None
    assert watch.look(101.9 + INTERVAL, 5001.9 + INTERVAL, one) is None
    assert watch.look(104.0, 5004.0, two) == Moved(lost=one, gained=two)
    # A process that was stopped: both clocks went on.
    assert watch.look(104.0 + INTERVAL + 60, 5004.0 + INTERVAL + 60, two) == Moved(slept=60.0)
    # A machine that slept: only the wall clock went on, and it woke up elsewhere.
    moved = watch.look(166.0, 5065.0 + INTERVAL + 600, one)
    assert moved == Moved(slept=600.0, lost=two, gained=one)
    assert str(moved) == "slept for 600 s; lost 192.0.2.2; now has 192.0.2.1"
    # A clock that is set back, and one that is a little off.
    assert watch.look(167.0, 100.0, one) is None
    assert watch.look(168.0, 100.0 + INTERVAL + SLEPT, one) is None
