"""What strangers and a member gone bad can do to a cluster that answers requests: nothing much."""

import contextlib
import os
import re
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from pxd.identity import Ticket

from .daemons import Daemon, all_hold, cluster

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

MIB = 1 << 20
GROWTH_LIMIT = 64 * MIB
LENGTH_S = 10.0
QUESTION, FACT = "What is 17 + 25?", "42"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    root = tmp_path_factory.mktemp("hostile")
    with cluster(root, ("anna", "ben"), ready=all_hold(2)) as daemons:
        for daemon in daemons:
            for _ in range(3):
                assert daemon.answer(QUESTION) == FACT
        yield daemons


def port_of(daemon: Daemon) -> int:
    [port] = {re.search(r"/tcp/(\d+)", a)[1] for a in Ticket.parse(daemon.ticket()).addresses}  # type: ignore[index]
    return int(port)


def memory(daemon: Daemon) -> int:
    return psutil.Process(daemon.process.pid).memory_info().rss


@contextmanager
def watched(daemons: list[Daemon]) -> Iterator[None]:
    """The nodes go on answering in this block, and none of them grows."""
    before = [memory(daemon) for daemon in daemons]
    most = before[:]
    over = threading.Event()
    answers: list[str] = []

    def ask() -> None:
        while not over.is_set():
            for daemon in daemons:
                answers.append(daemon.answer(QUESTION))

    def measure() -> None:
        while not over.wait(0.2):
            most[:] = [max(m, memory(d)) for m, d in zip(most, daemons, strict=True)]

    threads = [threading.Thread(target=ask), threading.Thread(target=measure)]
    for thread in threads:
        thread.start()
    try:
        yield
    finally:
        over.set()
        for thread in threads:
            thread.join()
    assert set(answers) == {FACT}
    growth = [m - b for m, b in zip(most, before, strict=True)]
    print(f"{len(answers)} answers; growth {[round(g / MIB, 1) for g in growth]} MiB")
    assert max(growth) < GROWTH_LIMIT
    for daemon in daemons:
        states = {node["name"]: node["state"] for node in daemon.status()["nodes"]}
        assert {states["anna"], states["ben"]} == {"alive"}


def until(seconds: float) -> Iterator[float]:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0:
        yield left


def test_garbage_slow_loris_and_a_crowd(pair: list[Daemon]) -> None:
    port = port_of(pair[0])
    with watched(pair), contextlib.ExitStack() as stack:
        crowd: list[socket.socket] = []
        for _ in range(500):
            connection = socket.create_connection(("127.0.0.1", port), timeout=5)
            crowd.append(stack.enter_context(connection))
        for number, connection in enumerate(crowd):
            connection.setblocking(False)
            with contextlib.suppress(OSError):
                connection.send(os.urandom(65536) if number % 2 else b"\x13/multistream/1.0.0\n")
        for _ in until(LENGTH_S):
            for connection in crowd[::2]:
                # One byte at a time of something that begins well.
                with contextlib.suppress(OSError):
                    connection.send(b"\x0b"[:1])
            with (
                socket.create_connection(("127.0.0.1", port), timeout=5) as garbage,
                contextlib.suppress(OSError),
            ):
                garbage.sendall(os.urandom(MIB))


def test_a_member_that_floods_the_cluster_with_the_largest_records(
    pair: list[Daemon], tmp_path: Path
) -> None:
    # How those it makes up are found out and forgotten is tested in virtual time.
    command = [sys.executable, "-m", "tests.e2e.flooder", pair[0].ticket(), str(tmp_path)]
    with watched(pair):
        flooder = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        try:
            assert flooder.stdout is not None
            said = flooder.stdout.readline().split()
            assert said[:1] == ["flooding"]
            busy = psutil.Process(flooder.pid)
            for _ in until(LENGTH_S):
                assert flooder.poll() is None
                busy.cpu_percent(0.5)
        finally:
            flooder.kill()
            flooder.wait()
