"""Keys replaced and nodes kicked on a cluster of real processes that runs on."""

import json
from pathlib import Path
from typing import Any

import pytest

from pxd.identity import Ticket

from .daemons import Daemon, Status, cluster, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

# Too little for any model: what is tested needs none.
IDLE = ("--memory", "0.0005")


def control(daemon: Daemon, *arguments: str) -> Any:
    done = daemon.pxd(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def names(told: list[dict[str, str]]) -> list[str]:
    return [node["name"] for node in told]


def alive(*names: str) -> Any:
    def check(status: Status) -> bool:
        nodes = {node["name"] for node in status["nodes"] if node["state"] == "alive"}
        return nodes == set(names)

    return check


def key_of(daemon: Daemon) -> bytes:
    return Ticket.parse(daemon.ticket()).key


def wait_key(daemon: Daemon, key: bytes) -> None:
    wait_for(lambda: key_of(daemon) == key, f"{daemon.name} has the new key")


def test_a_cluster_gets_a_new_key_and_kicks_a_node(tmp_path: Path) -> None:
    with cluster(tmp_path, ("anna", "ben", "carl"), *IDLE, serving=False) as daemons:
        anna, ben, carl = daemons
        for daemon in daemons:
            daemon.wait_status(alive("anna", "ben", "carl"), "all are there")
        processes = [daemon.process.pid for daemon in (anna, ben)]
        first = anna.ticket()

        # One that is off meanwhile comes back with the old key and is given the new one.
        carl.end()
        rotated = control(anna, "key", "rotate")
        assert (rotated["generation"], rotated["grace"]) == (1, 86400)
        assert names(rotated["told"]["confirmed"]) == ["ben"]
        second = key_of(anna)
        assert second == key_of(ben) != Ticket.parse(first).key
        carl.start()
        wait_key(carl, second)
        anna.wait_status(alive("anna", "ben", "carl"), "carl is back")

        # Without grace the old key and its tickets end at once, and one who comes late hears so.
        stale = anna.ticket()
        rotated = control(ben, "key", "rotate", "--grace", "0")
        assert names(rotated["told"]["confirmed"]) == ["anna", "carl"]
        late = Daemon(tmp_path, "late", *IDLE, join=stale)
        try:
            wait_for(lambda: "the cluster's key was replaced" in late.log, "late is told why")
            assert "pxd ticket" in late.log
            alone = alive("late")(late.status())
        finally:
            late.end()
        assert alone

        # The kicked one is gone everywhere, at once, and gets neither in nor hold of the key.
        kicked = control(anna, "kick", "--rotate", "carl")
        assert kicked["node"]["id"] == carl.id
        assert names(kicked["rotation"]["told"]["confirmed"]) == ["ben"]
        for daemon in (anna, ben):
            daemon.wait_status(lambda status: len(status["nodes"]) == 2, "carl is gone")
        assert key_of(anna) == key_of(ben) != key_of(carl)
        assert [ban["name"] for ban in control(ben, "kick", "--list")["bans"]] == ["carl"]
        carl.end()
        before = len(carl.log)
        carl.start()
        told = "this node was kicked out of the cluster"
        wait_for(lambda: carl.log.count(told, before) >= 2, "carl is refused by both")
        [seen] = [node for node in carl.status()["nodes"] if node["name"] == "carl"]
        assert told in seen["problem"]
        assert "pxd kick --undo" in seen["problem"]
        refused = anna.pxd("kick", "anna")
        assert (refused.returncode, "pxd stop" in refused.stderr) == (1, True)

        # With the ban undone, a fresh ticket is all it needs: it is still its cluster's member.
        control(ben, "kick", "--undo", "carl")
        assert control(anna, "kick", "--list") == {"bans": []}
        carl.end()
        carl.join(anna.ticket())
        for daemon in daemons:
            daemon.wait_status(alive("anna", "ben", "carl"), "all are there again")
        assert key_of(carl) == key_of(anna)
        assert [daemon.process.pid for daemon in (anna, ben)] == processes
        for daemon in daemons:
            assert "Traceback" not in daemon.log
