"""A cluster over the wide area: two homes behind routers, and a relay that both can reach."""

from pathlib import Path

import pytest

from tests.netns import homes, needs_netns

from .daemons import Daemon, Status, pipelines, wait_for
from .test_lan import FACT, QUESTION

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_netns]

LAYERS = ("--max-layers", "4")


def test_two_homes_share_a_model_through_a_relay(tmp_path: Path) -> None:
    # One router keeps port numbers, the other does not: no hole can be punched.
    with homes(False, True) as ([one, two], [public, _]):
        daemons: list[Daemon] = []
        try:
            relay = Daemon(tmp_path, "relay", "--relay", "--max-layers", "1", machine=public)
            daemons.append(relay)
            a = Daemon(tmp_path, "a", *LAYERS, join=relay.ticket(), machine=one)
            daemons.append(a)
            a.wait_status(lambda status: len(status["nodes"]) == 2, "the relay is found")
            # Its own address means nothing elsewhere; the ticket leads through the relay as well.
            b = Daemon(tmp_path, "b", *LAYERS, join=a.ticket(), machine=two)
            daemons.append(b)

            def relayed(status: Status) -> bool:
                paths = {node["name"]: node["path"] for node in status["nodes"]}
                return {"relayed", "direct"} <= set(paths.values())

            for daemon in (a, b):
                status = daemon.wait_status(relayed, "the other home, through the relay")
                through = {node["through"] for node in status["nodes"] if node["path"] == "relayed"}
                assert through == {relay.id}
                assert [node["name"] for node in status["nodes"] if node["relay"]] == ["relay"]

            def split() -> bool:
                lines = pipelines(b.status())
                return any({a.id, b.id} <= {stage["node"] for stage in line} for line in lines)

            wait_for(split, "a pipeline over both homes")
            for daemon in (b, a):
                assert daemon.answer(QUESTION) == FACT
            assert "a     is reached through relay only" in b.pxd("status").stdout
        finally:
            for daemon in daemons:
                daemon.end()
            for daemon in daemons:
                print(f"----- log of {daemon.name}\n{daemon.log[-3000:]}")
