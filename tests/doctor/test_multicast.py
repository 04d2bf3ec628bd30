"""Multicast: the test of this machine, and who is heard."""

import socket

import pytest
import trio

from pxd.doctor import loops
from pxd.doctor.firewall import Firewall
from pxd.doctor.interfaces import Interface, interface_of, interfaces
from pxd.doctor.loops import Loop
from pxd.doctor.multicast import loopback, multicast
from pxd.settings import Settings

from .patients import (
    ETH,
    IDS,
    TUNNEL,
    Discovery,
    Heard,
    facts,
    levels,
    only,
    peer,
    status,
)

GOOD, BAD = Loop(ETH), Loop(ETH, "it did not come back")
OFF = (Firewall(name="nftables", state="off"),)
ON = (Firewall(name="nftables", state="on"),)
BEN = peer("ben", "10.0.0.2")


def test_this_machine() -> None:
    assert only(loopback([GOOD], ())).level == "ok"
    found = only(loopback([BAD], ()))
    assert found.level == "problem"
    assert "multicast is blocked on eth0" in found.text
    assert "UDP 5353" in found.remedy
    assert only(loopback([Loop(TUNNEL, "no")], ())).level == "note"
    assert only(loopback([], ())).level == "note"
    assert only(loopback(None, None)).level == "note"
    assert levels(loopback([GOOD, Loop(TUNNEL, "no")], ())) == {"multicast": "note"}


def test_everybody_is_heard() -> None:
    here = facts(BEN, discovered=Discovery(heard=(Heard(IDS["ben"]),)))
    assert levels(multicast(here, [GOOD], ON)) == {"multicast": "ok", "neighbours": "ok"}


def test_a_neighbour_is_connected_but_never_heard() -> None:
    found = multicast(facts(BEN, discovered=Discovery()), [GOOD], ON)
    assert levels(found) == {"multicast": "ok", "neighbours": "warning"}
    assert "does not get through between ben and this machine" in found[1].text
    assert "pxd start --join TICKET" in found[1].remedy


def test_an_answer_counts_as_heard() -> None:
    answered = Loop(ETH, "", ("10.0.0.2",))
    assert levels(multicast(facts(BEN), [answered], OFF))["neighbours"] == "ok"
    assert (
        levels(multicast(facts(BEN, discovered=Discovery()), [answered], ON))["neighbours"] == "ok"
    )


def test_without_a_firewall_here_silence_now_outweighs_what_was_heard_before() -> None:
    here = facts(BEN, discovered=Discovery(heard=(Heard(IDS["ben"]),)))
    assert levels(multicast(here, [GOOD], OFF))["neighbours"] == "warning"
    assert levels(multicast(here, [GOOD], None))["neighbours"] == "ok"


def test_the_own_machine_comes_first() -> None:
    found = multicast(facts(BEN, discovered=Discovery()), [BAD], ON)
    assert levels(found) == {"multicast": "problem", "neighbours": "warning"}
    assert "first let multicast through on this machine" in found[-1].remedy


@pytest.mark.parametrize(
    "other",
    [
        peer("ben", "192.168.7.7"),
        peer("ben", "10.0.0.1", here=True),
        peer("ben", "10.0.0.2", state="dead"),
    ],
)
def test_only_neighbours_need_be_heard(other: object) -> None:
    found = multicast(facts(other, discovered=Discovery()), [GOOD], OFF)  # type: ignore[arg-type]
    assert levels(found).get("neighbours") in (None, "note")


def test_a_young_node_has_time() -> None:
    young = facts(BEN, discovered=Discovery(), status=status(uptime=3.0))
    assert levels(multicast(young, [GOOD], OFF))["neighbours"] == "ok"


def test_alone() -> None:
    found = multicast(facts(discovered=Discovery()), [GOOD], OFF)
    assert "no other pxd is heard on this network" in found[1].text
    assert levels(found)["neighbours"] == "note"


def test_another_cluster_is_near() -> None:
    foreign = Discovery(
        foreign=(Heard(IDS["evil"], ("/ip4/10.0.0.9/tcp/8471/p2p/" + IDS["evil"],)),)
    )
    alone = multicast(facts(discovered=foreign), [GOOD], OFF)
    assert levels(alone)["other-clusters"] == "warning"
    assert "at 10.0.0.9" in alone[-1].text
    together = multicast(facts(BEN, discovered=foreign), [GOOD], ON)
    assert levels(together)["other-clusters"] == "note"


def test_mdns_does_not_run() -> None:
    broken = multicast(facts(discovered=Discovery(mdns="no such device")), [GOOD], OFF)
    assert levels(broken) == {"multicast": "problem"}
    assert "no such device" in broken[-1].text
    settings = Settings(data_dir=facts().settings.data_dir, name="me", mdns=False)
    off = only(multicast(facts(BEN, settings=settings), [BAD], OFF))
    assert (off.level, "--no-mdns" in off.text) == ("note", True)


def test_interfaces_of_this_machine() -> None:
    for interface in interfaces():
        assert interface.holds(interface.address)
        assert not interface.address.startswith("127.")
        assert interface_of(interface.address, interfaces()) == interface.name
    assert not ETH.holds("10.0.1.1")
    assert not ETH.holds("no address")
    assert interface_of("1.2.3.4", (ETH,)) == ""


def test_the_query_is_a_dns_question() -> None:
    packet = loops.query()
    assert packet[4:6] == b"\0\1"
    assert b"\4_pxd\4_tcp\5local\0\0\14\0\1" in packet
    assert len({loops.query()[:2] for _ in range(8)}) > 1


def _loopback_multicast() -> bool:
    """Whether this machine lets multicast out on its loopback interface at all."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton("127.0.0.1"))
        try:
            probe.sendto(b"", (loops.GROUP, 9))
        except OSError:
            return False
    return True


@pytest.mark.skipif(not _loopback_multicast(), reason="no multicast on loopback here")
async def test_a_packet_comes_back(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loops, "WAIT_S", 0.3)
    local = Interface("lo", "127.0.0.1", "127.0.0.0/8", multicast=True, inner=False)
    [loop] = await loops.test_all((local, TUNNEL_WITHOUT))
    assert (loop.interface, loop.failure) == (local, "")


TUNNEL_WITHOUT = Interface("tun0", "10.9.0.1", "10.9.0.0/24", multicast=False, inner=True)


async def test_an_interface_that_is_gone() -> None:
    gone = Interface("eth9", "192.0.2.77", "192.0.2.0/24", multicast=True, inner=False)
    assert (await loops.test(gone)).failure


class Void:
    """A socket to which nothing ever comes; counts what is sent."""

    def __init__(self) -> None:
        self.sent = 0

    async def recvfrom(self, _: int) -> tuple[bytes, tuple[str, int]]:
        await trio.sleep_forever()
        raise AssertionError

    async def sendto(self, data: bytes, to: object) -> int:
        self.sent += 1
        return len(data)


async def test_a_packet_that_does_not_come_back(autojump_clock: trio.testing.MockClock) -> None:
    void = Void()
    loop = await loops._exchange(ETH, void, void)  # type: ignore[arg-type]
    assert "did not come back" in loop.failure
    assert void.sent == loops.TRIES
