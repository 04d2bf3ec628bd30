"""Facts about nodes that need not exist."""

from pathlib import Path
from typing import Any

import msgspec

from pxd.cluster.records import Device, NodeRecord
from pxd.doctor.facts import Facts, Peer
from pxd.doctor.findings import Finding
from pxd.doctor.interfaces import Interface
from pxd.serving.status import ClusterStatus, ModelView
from pxd.settings import Settings

NOW = 1_700_000_000.0
IDS = {
    name: "12D3KooW" + letter * 44
    for name, letter in (("me", "M"), ("ben", "B"), ("carl", "C"), ("dora", "D"), ("evil", "E"))
}
ETH = Interface("eth0", "10.0.0.1", "10.0.0.0/24", multicast=True, inner=False)
TUNNEL = Interface("wg0", "10.8.0.1", "10.8.0.0/24", multicast=True, inner=True)


def address(name: str, host: str, port: int = 8471) -> str:
    return f"/ip4/{host}/tcp/{port}/p2p/{IDS[name]}"


def record(name: str, *hosts: str, **more: Any) -> NodeRecord:
    fields: dict[str, Any] = {"pxd": "0.1.0", "device": Device(executors=("mlx",))}
    addresses = tuple(address(name, host) for host in hosts)
    return NodeRecord(id=IDS[name], name=name, addresses=addresses, **(fields | more))


def peer(name: str, host: str | None = "10.0.0.2", **more: Any) -> Peer:
    fields: dict[str, Any] = {
        "record": record(name, *((host,) if host else ())),
        "state": "alive",
        "since": 60.0,
        "host": host,
        "rtt": 0.0004,
    }
    return Peer(id=IDS[name], name=name, **(fields | more))


def status(**more: Any) -> ClusterStatus:
    fields: dict[str, Any] = {
        "self_id": IDS["me"],
        "leader": IDS["me"],
        "term": 1,
        "epoch": "1.1@M",
        "nodes": [],
        "models": [ModelView(name="demo", state="serving", reason="", layers=8, pipelines=[])],
        "http": "http://127.0.0.1:8470",
        "version": "0.1.0",
        "uptime": 300.0,
    }
    return ClusterStatus(**(fields | more))


def facts(*peers: Peer, **more: Any) -> Facts:
    fields: dict[str, Any] = {
        "own": record("me", "10.0.0.1"),
        "settings": Settings(data_dir=Path("/nowhere/pxd"), name="me"),
        "status": status(),
        "interfaces": (ETH,),
        "ports": (8471, 8472),
        "now": NOW,
    }
    return Facts(peers=peers, **(fields | more))


class Heard(msgspec.Struct, frozen=True):
    peer: str
    addresses: tuple[str, ...] = ()
    age_s: float = 5.0


class Discovery(msgspec.Struct, frozen=True):
    mdns: str = ""
    heard: tuple[Heard, ...] = ()
    foreign: tuple[Heard, ...] = ()


def levels(found: list[Finding]) -> dict[str, str]:
    """The worst level by check."""
    order = ["ok", "note", "warning", "problem"]
    worst: dict[str, str] = {}
    for finding in found:
        known = worst.get(finding.check, "ok")
        worst[finding.check] = max(known, finding.level, key=order.index)
    return worst


def only(found: list[Finding]) -> Finding:
    """The single finding; one that is bad has a remedy."""
    [finding] = found
    assert finding.remedy or finding.level in ("ok", "note")
    return finding
