"""Whole examinations: in daemons' stead three real networks on loopback, and no daemon at all."""

from collections.abc import Mapping
from functools import partial
from pathlib import Path

import msgspec
import pytest
import trio

from pxd.cluster.members import Member
from pxd.cluster.records import Device, NodeRecord, PeerLink
from pxd.doctor import alone, doctor, firewall, loops
from pxd.doctor.doctor import Doctor, Part, finish, judged
from pxd.doctor.findings import Report, ok, problem
from pxd.doctor.firewall import Firewall
from pxd.doctor.loops import Loop
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.settings import Settings
from tests.p2p.nodes import Nodes, eventually

from .patients import ETH, Discovery, Heard, levels, status

DEVICE = Device(kind="cpu", name="EPYC", tflops=0.5, bandwidth=20.0, executors=("mlx",))
ORDER = [
    "daemon", "leader", "nodes", "model", "reach", "data-port", "firewall", "multicast",
    "cluster-key", "version", "clock", "links", "disk", "memory", "executor",
]  # fmt: skip


class Node:
    """A network with a doctor, and what membership would know."""

    def __init__(self, network: Libp2pNetwork, name: str, directory: Path) -> None:
        self.network = network
        self.name = name
        self.version = "0.1.0"
        self.addresses: tuple[str, ...] | None = None
        self.members: dict[str, Member] = {}
        self.links: tuple[PeerLink, ...] = ()
        settings = Settings(data_dir=directory, name=name)
        self.doctor = Doctor(
            network, lambda: self.members, self._status, lambda: ["demo"], settings
        )

    def record(self) -> NodeRecord:
        addresses = self.network.addresses() if self.addresses is None else self.addresses
        return NodeRecord(
            id=self.network.peer_id,
            name=self.name,
            pxd=self.version,
            addresses=addresses,
            device=DEVICE,
            memory=1 << 20,
            links=self.links,
        )

    def _status(self):
        return status(self_id=self.network.peer_id, leader=self.network.peer_id)


def meet(*nodes: Node) -> None:
    """Everybody learns everybody's record as it is now."""
    members: Mapping[str, Member] = {
        node.network.peer_id: Member(node.record(), "alive", trio.current_time(), 1, rtt=0.0002)
        for node in nodes
    }
    for node in nodes:
        node.members = dict(members)


@pytest.fixture
async def nodes(nursery: trio.Nursery, tmp_path: Path) -> Nodes:
    return Nodes(nursery, tmp_path)


@pytest.fixture(autouse=True)
def quiet_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    """This machine's own firewall and multicast are none of these tests' business."""

    async def nothing(*_: object) -> tuple[Firewall, ...]:
        return (Firewall(name="nftables", state="off"),)

    async def fine(*_: object) -> tuple[Loop, ...]:
        return (Loop(ETH),)

    monkeypatch.setattr(firewall, "detect", nothing)
    monkeypatch.setattr(loops, "test_all", fine)


async def cluster(nodes: Nodes, directory: Path) -> list[Node]:
    first = await nodes.start()
    others = [await nodes.start(first), await nodes.start(first)]
    made = [
        Node(network, name, directory)
        for network, name in zip((first, *others), ("anna", "ben", "carl"), strict=True)
    ]
    meet(*made)
    return made


def by_level(report: Report) -> dict[str, str]:
    return levels(list(report.findings))


async def test_a_healthy_cluster(nodes: Nodes, tmp_path: Path) -> None:
    anna, _, _ = await cluster(nodes, tmp_path)
    report = await anna.doctor.examine()
    found = by_level(report)
    assert list(dict.fromkeys(f.check for f in report.findings)) == ORDER
    machine = ("disk", "memory")
    assert {
        check: level for check, level in found.items() if check not in machine
    } == dict.fromkeys((check for check in ORDER if check not in machine), "ok")
    assert report.healthy
    assert report.daemon
    text = next(f.text for f in report.findings if f.check == "reach")
    assert text.startswith("ben and carl can connect to this machine")


async def test_a_blocked_port(nodes: Nodes, tmp_path: Path) -> None:
    anna, ben, carl = await cluster(nodes, tmp_path)
    # Nobody listens on what anna says is her port, as if a firewall refused it.
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    anna.addresses = (f"/ip4/127.0.0.1/tcp/{port}/p2p/{anna.network.peer_id}",)
    meet(anna, ben, carl)
    report = await anna.doctor.examine()
    assert not report.healthy
    assert by_level(report)["reach"] == "problem"
    [found] = [f for f in report.findings if f.check == "reach"]
    assert "ben and carl cannot connect to this machine" in found.text
    assert "refused" in found.text
    assert (await ben.doctor.examine()).healthy


async def test_a_wrong_key_is_named_on_both_sides(nodes: Nodes, tmp_path: Path) -> None:
    anna, *_ = await cluster(nodes, tmp_path)
    there = anna.network.addresses()[0]
    stranger = await nodes.run(nodes.make(there, key=b"x" * 32))
    await eventually(lambda: bool(stranger.refusals() and anna.network.refusals()))
    evil = Node(stranger, "evil", tmp_path)
    meet(evil)
    for node in (anna, evil):
        report = await node.doctor.examine()
        assert not report.healthy
        [found] = [f for f in report.findings if f.check == "cluster-key"]
        assert found.level == "problem"
        assert "holds another key" in found.text
        assert "pxd ticket" in found.remedy


async def test_a_peer_of_an_older_version(nodes: Nodes, tmp_path: Path) -> None:
    anna, ben, carl = await cluster(nodes, tmp_path)
    ben.version = "0.0.9"
    meet(anna, ben, carl)
    report = await anna.doctor.examine()
    assert by_level(report)["version"] == "warning"
    [found] = [f for f in report.findings if f.check == "version"]
    assert "pxd 0.1.0, ben with pxd 0.0.9" in found.text


async def test_a_peer_without_a_doctor(nodes: Nodes, tmp_path: Path) -> None:
    first = await nodes.start()
    old = await nodes.start(first)
    anna = Node(first, "anna", tmp_path)
    meet(anna)
    known = msgspec.structs.replace(anna.record(), id=old.peer_id, name="old")
    anna.members[old.peer_id] = Member(known, "alive", trio.current_time(), 1)
    found = by_level(await anna.doctor.examine())
    assert (found["reach"], found["clock"]) == ("note", "note")


async def test_blocked_multicast(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna, *_ = await cluster(nodes, tmp_path)

    async def lost(*_: object) -> tuple[Loop, ...]:
        return (Loop(ETH, "it did not come back"),)

    monkeypatch.setattr(loops, "test_all", lost)
    report = await anna.doctor.examine()
    assert not report.healthy
    assert by_level(report)["multicast"] == "problem"


async def test_what_the_network_knows_more_is_used(nodes: Nodes, tmp_path: Path) -> None:
    anna, ben, carl = await cluster(nodes, tmp_path)

    class Knowing:
        """The network, and what other parts of it will tell."""

        def __getattr__(self, name: str) -> object:
            return getattr(anna.network, name)

        def discovery(self) -> Discovery:
            return Discovery(foreign=(Heard("12D3KooWxyz", ("10.0.0.9",)),))

        def relayed(self) -> frozenset[str]:
            return frozenset({carl.network.peer_id})

    anna.doctor._network = Knowing()  # type: ignore[assignment]
    anna.links = (PeerLink(ben.network.peer_id, 0.001, 0.01),)
    meet(anna, ben, carl)
    report = await anna.doctor.examine()
    [found] = [f for f in report.findings if f.check == "links"]
    assert "carl can be reached through a relay only" in found.text
    assert "less than 0.05 GB/s to ben" in found.text
    assert by_level(report)["other-clusters"] == "note"


async def test_names_that_two_nodes_share_are_told_apart(nodes: Nodes, tmp_path: Path) -> None:
    anna, ben, carl = await cluster(nodes, tmp_path)
    ben.name = carl.name = "twin"
    meet(anna, ben, carl)
    report = await anna.doctor.examine()
    [found] = [f for f in report.findings if f.check == "cluster-key"]
    assert f"twin~{ben.network.peer_id[-5:]}" in found.text


async def test_a_part_that_hangs_or_fails_costs_only_itself(
    autojump_clock: object, caplog: pytest.LogCaptureFixture
) -> None:
    async def hangs() -> int:
        await trio.sleep_forever()
        raise AssertionError

    async def fails() -> int:
        raise ZeroDivisionError

    async def works() -> int:
        return 7

    hanging, failing, working = Part("a", hangs), Part("b", fails), Part("c", works)
    await finish(hanging, failing, working, within=5.0)
    assert (hanging.value, failing.value, working.value) == (None, None, 7)
    assert trio.current_time() == pytest.approx(5.0)
    assert "test of b failed" in caplog.text


def test_a_check_that_fails_says_so_in_its_place() -> None:
    found = judged(
        ("first", lambda: [ok("first", "fine")]),
        ("second", lambda: [][0]),
        ("third", lambda: [problem("third", "bad", "mend it")]),
    )
    assert [(f.check, f.level) for f in found] == [
        ("first", "ok"),
        ("second", "note"),
        ("third", "problem"),
    ]


async def test_examinations_follow_each_other(
    nodes: Nodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    anna = Node(await nodes.start(), "anna", tmp_path)
    meet(anna)
    running = most = 0

    async def counted(*_: object) -> tuple[Loop, ...]:
        nonlocal running, most
        running += 1
        most = max(most, running)
        await trio.testing.wait_all_tasks_blocked()
        running -= 1
        return ()

    monkeypatch.setattr(loops, "test_all", counted)
    async with trio.open_nursery() as nursery:
        nursery.start_soon(anna.doctor.examine)
        nursery.start_soon(anna.doctor.examine)
    assert most == 1


@pytest.fixture
def fast_executor(monkeypatch: pytest.MonkeyPatch) -> None:
    async def measured(wanted: str, timeout: float) -> tuple[Device | None, str]:
        return DEVICE, ""

    monkeypatch.setattr(alone.engines, "measured", measured)


async def test_without_a_daemon(tmp_path: Path, fast_executor: None) -> None:
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    settings = Settings(data_dir=tmp_path, name="me", listen=f"127.0.0.1:{port}")
    first = problem("daemon", "no daemon runs", "start it:\npxd start")
    examine = partial(alone.examine, settings, first)
    async with listener:
        report = await examine()
    assert not report.daemon
    assert not report.healthy
    assert report.findings[0] == first
    found = by_level(report)
    assert (found["ports"], found["firewall"], found["executor"]) == ("note", "ok", "ok")
    assert "ports" not in by_level(await examine(silent=True))


async def test_pxd_on_the_network_is_seen_without_a_daemon(
    tmp_path: Path, fast_executor: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def answered(*_: object) -> tuple[Loop, ...]:
        return (Loop(ETH, "", ("10.0.0.2",)),)

    monkeypatch.setattr(loops, "test_all", answered)
    settings = Settings(data_dir=tmp_path, name="me")
    report = await alone.examine(settings, problem("daemon", "x", "y"))
    assert "pxd runs on this network at 10.0.0.2" in [f.text for f in report.findings]


def test_the_deadline_is_what_was_promised() -> None:
    assert doctor.DEADLINE_S < 10
