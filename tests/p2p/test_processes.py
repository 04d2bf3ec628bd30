"""A peer in another process that is killed, or stopped and continued."""

import signal
import sys
from pathlib import Path

import pytest
import trio

from pxd import wire
from pxd.p2p.network import PeerUnreachable
from tests.p2p.nodes import ECHO, Nodes, Text, eventually
from tests.p2p.test_channels import Collector, step

pytestmark = [pytest.mark.slow, pytest.mark.alone]


async def start_peer(nursery: trio.Nursery, directory: Path, *join: str) -> trio.Process:
    directory.mkdir(exist_ok=True)
    command = [sys.executable, "-m", "tests.p2p.peer_process", str(directory), *join]

    async def run(*, task_status: trio.TaskStatus) -> None:
        await trio.run_process(command, check=False, task_status=task_status)

    process: trio.Process = await nursery.start(run)
    return process


async def test_a_killed_peer_is_gone_at_once_and_heals_when_started_again(
    nodes: Nodes, tmp_path: Path
) -> None:
    a = await nodes.start()
    at_a = Collector(a)
    changes: list[bool] = []
    a.on_peer(lambda peer, up: changes.append(up))
    for life in range(2):
        async with trio.open_nursery() as nursery:
            process = await start_peer(nursery, tmp_path / "peer", *a.addresses())
            await eventually(lambda: bool(a.peers()), within=60)
            (peer,) = a.peers()
            assert await a.call(peer, ECHO, Text("hi"), timeout=10) == Text("hi")
            await a.send(peer, step(life, 2), b"back")
            await at_a.wait_for(life + 1)
            process.send_signal(signal.SIGKILL)
            await eventually(lambda: not a.peers(), within=5)
            with pytest.raises(PeerUnreachable):
                await a.send(peer, wire.Cancel(request="too late"))
    assert changes == [True, False, True, False]


async def test_a_stopped_peer_is_noticed_hurts_nobody_and_comes_back(
    nodes: Nodes, tmp_path: Path
) -> None:
    a = await nodes.start()
    other = await nodes.start(a)
    Collector(a)
    at_other = Collector(other)
    async with trio.open_nursery() as nursery:
        process = await start_peer(nursery, tmp_path / "peer", *a.addresses())
        await eventually(lambda: len(a.peers()) == 2, within=60)
        (peer,) = a.peers() - {other.peer_id}
        assert await a.call(peer, ECHO, Text("hi"), timeout=10) == Text("hi")
        process.send_signal(signal.SIGSTOP)
        failures: list[str] = []

        async def expect_failure(action: str) -> None:
            try:
                if action == "call":
                    await a.call(peer, ECHO, Text("hello?"), timeout=60)
                while action == "send":
                    await a.send(peer, step(0, 1 << 20), bytes(2 << 20))
            except PeerUnreachable:
                failures.append(action)

        async with trio.open_nursery() as waiting:
            waiting.start_soon(expect_failure, "call")
            waiting.start_soon(expect_failure, "send")
            for number in range(20):
                await a.send(other.peer_id, step(number, 1), b"xx")
                assert await a.call(other.peer_id, ECHO, Text("fine"), timeout=10)
            await at_other.wait_for(20)
            await eventually(lambda: peer not in a.peers(), within=20)
        assert sorted(failures) == ["call", "send"]
        process.send_signal(signal.SIGCONT)
        await eventually(lambda: peer in a.peers(), within=30)
        assert await a.call(peer, ECHO, Text("welcome back"), timeout=30)
        process.kill()
