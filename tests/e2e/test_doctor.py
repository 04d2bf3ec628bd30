"""`pxd doctor` on real daemons on machines of their own, with one thing wrong after the other."""

import json
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from pxd.identity import Ticket
from tests.netns import Machine, lan, needs_netns

from .daemons import Daemon, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_netns]

NAMES = ("ann", "bob", "cat", "old", "far")
Findings = dict[str, dict[str, Any]]


class OldDaemon(Daemon):
    """Says that it is of an earlier release."""

    def _pxd(self, *arguments: str) -> list[str]:
        command = super()._pxd(*arguments)
        script = "import pxd; pxd.__version__ = '0.0.9'; from pxd.cli.main import main; main()"
        at = command.index("-m")
        return [*command[:at], "-c", script, *command[at + 2 :]]


def examine(daemon: Daemon) -> tuple[bool, Findings]:
    """Whether all is well, and the gravest finding of each check."""
    done = daemon.pxd("doctor", "--json")
    report = json.loads(done.stdout)
    assert done.returncode == (0 if report["healthy"] else 1), done.stderr
    graveness = ("ok", "note", "warning", "problem")
    found: Findings = {}
    for finding in report["findings"]:
        known = found.get(finding["check"])
        if known is None or graveness.index(finding["level"]) > graveness.index(known["level"]):
            found[finding["check"]] = finding
    return report["healthy"], found


def problems(daemon: Daemon) -> Findings:
    _, found = examine(daemon)
    return {check: f for check, f in found.items() if f["level"] == "problem"}


def met(*daemons: Daemon) -> bool:
    names = {daemon.name for daemon in daemons}
    return all(
        {n["name"] for n in daemon.status()["nodes"] if n["state"] == "alive"} == names
        for daemon in daemons
    )


@contextmanager
def running(*daemons: Daemon) -> Iterator[None]:
    try:
        yield
    finally:
        for daemon in daemons:
            daemon.end()
            print(f"----- log of {daemon.name}\n{daemon.log[-3000:]}")


@pytest.fixture
def machines() -> Iterator[list[Machine]]:
    with lan(NAMES) as found:
        yield found


def test_each_cause_is_named(machines: list[Machine], tmp_path: Path) -> None:
    key = secrets.token_bytes(32)
    ticket = str(Ticket(key, ()))
    three: list[Daemon] = []
    for name, machine in zip(NAMES[:3], machines, strict=False):
        three.append(Daemon(tmp_path, name, join=ticket, machine=machine))
        assert three[0].url
    ann, bob, _ = three
    with running(*three):
        wait_for(lambda: met(*three), "three have met")
        wait_for(lambda: examine(ann)[0], "all is well with ann")

        assert ann.machine
        assert bob.machine
        ann.machine.nft("incoming tcp dport 8471 ct state new drop")
        found = problems(ann)
        assert "bob and cat cannot connect to this machine on port 8471" in found["reach"]["text"]
        assert "tcp dport 8471" in found["firewall"]["text"]
        assert "nft" in found["firewall"]["remedy"]
        assert not problems(bob)
        ann.machine.heal()

        ann.machine.nft("incoming udp dport 5353 drop", "outgoing udp dport 5353 drop")
        found = problems(ann)
        assert "could not be sent" in found["multicast"]["text"]
        assert "UDP 5353" in found["multicast"]["remedy"]
        ann.machine.heal()
        bob.machine.nft("incoming udp dport 5353 drop")
        assert "did not come back" in problems(bob)["multicast"]["text"]
        bob.machine.heal()

        there = Ticket.parse(ann.ticket()).addresses
        far = Daemon(
            tmp_path, "far", join=str(Ticket(secrets.token_bytes(32), there)), machine=machines[4]
        )
        with running(far):
            wait_for(lambda: "cluster-key" in problems(far), "far knows that its key is wrong")
            text = problems(far)["cluster-key"]
            assert "another key" in text["text"]
            assert "pxd ticket" in text["remedy"]
            wait_for(lambda: "cluster-key" in problems(ann), "ann knows who has a wrong key")

        old = OldDaemon(tmp_path, "old", join=ticket, machine=machines[3])
        with running(old):
            wait_for(lambda: met(*three, old), "the old one is there")
            found_version = examine(ann)[1]["version"]
            assert found_version["level"] == "warning"
            assert "old with pxd 0.0.9" in found_version["text"]
            assert found_version["remedy"]
