"""Five machines on one network that find each other by multicast alone, and what may befall them.

The faults come one after the other over the same cluster, which has to come through all of them.
"""

import itertools
import json
import secrets
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import httpx
import pytest

from pxd.identity import Ticket
from tests.netns import lan, needs_netns, partition

from .daemons import Daemon, Status, pipelines, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.alone, needs_netns]

NAMES = ("ann", "bob", "cat", "dan", "eve")
QUESTION, FACT = "What is the capital of Norway?", "Oslo"


def states(status: Status) -> dict[str, str]:
    return {node["name"]: node["state"] for node in status["nodes"]}


def agreed(daemons: list[Daemon]) -> bool:
    """They see exactly each other, one leader and one plan, which serves."""
    views = [daemon.status() for daemon in daemons]
    names = {daemon.name for daemon in daemons}
    return (
        all({n for n, s in states(view).items() if s == "alive"} == names for view in views)
        and len({(view["leader"], view["epoch"]) for view in views}) == 1
        and views[0]["leader"] in {view["self"] for view in views}
        and bool(pipelines(views[0]))
    )


def leader_of(daemons: list[Daemon]) -> Daemon:
    [leader] = {daemon.status()["leader"] for daemon in daemons}
    return next(daemon for daemon in daemons if daemon.id == leader)


def seen_by(daemons: list[Daemon], name: str, *wanted: str | None) -> Callable[[], bool]:
    return lambda: all(states(daemon.status()).get(name) in wanted for daemon in daemons)


@pytest.fixture(scope="module")
def five(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    root = tmp_path_factory.mktemp("lan")
    # A ticket without any address: the key, and nothing that says where the others are.
    ticket = str(Ticket(secrets.token_bytes(32), ()))
    daemons: list[Daemon] = []
    with lan(NAMES) as machines:
        try:
            for name, machine in zip(NAMES, machines, strict=True):
                daemons.append(Daemon(root, name, join=ticket, machine=machine))
                assert daemons[0].url
            wait_for(lambda: agreed(daemons), "one cluster of five", 120)
            yield daemons
        finally:
            for daemon in daemons:
                daemon.end()
            for daemon in daemons:
                print(f"----- log of {daemon.name}\n{daemon.log[-3000:]}")


@contextmanager
def clients(daemons: list[Daemon]) -> Iterator[list[str]]:
    """Somebody asks each of these nodes again and again; yields what went wrong."""
    failures: list[str] = []
    over = threading.Event()

    def ask(daemon: Daemon) -> None:
        while not over.is_set():
            try:
                answer = daemon.answer(QUESTION)
            except (AssertionError, httpx.HTTPError) as error:
                failures.append(f"{daemon.name}: {error!r}")
                return
            if answer != FACT:
                failures.append(f"{daemon.name}: {answer!r}")

    threads = [threading.Thread(target=ask, args=(daemon,)) for daemon in daemons]
    for thread in threads:
        thread.start()
    try:
        yield failures
    finally:
        over.set()
        for thread in threads:
            thread.join()


def test_multicast_alone_forms_the_cluster(five: list[Daemon]) -> None:
    for daemon in five:
        assert daemon.answer(QUESTION) == FACT


def check_short_freeze(victim: Daemon, others: list[Daemon]) -> None:
    """It kills nobody."""
    victim.signal(signal.SIGSTOP)
    ever_dead = False
    until = time.monotonic() + 3
    while time.monotonic() < until:
        ever_dead |= any(states(daemon.status())[victim.name] == "dead" for daemon in others)
    victim.signal(signal.SIGCONT)
    wait_for(lambda: agreed([victim, *others]), "one cluster again", 10)
    assert not ever_dead
    assert not any(f"({victim.id}) is gone" in daemon.log for daemon in others)


def check_restart(victim: Daemon, others: list[Daemon]) -> None:
    """A node that restarts at once is one node."""
    before = len(others[0].status()["nodes"])
    victim.signal(signal.SIGKILL)
    victim.process.wait()
    victim.start()
    wait_for(lambda: agreed([victim, *others]), "it is back", 60)
    for daemon in others:
        names = [node["name"] for node in daemon.status()["nodes"]]
        assert names.count(victim.name) == 1
        assert len(names) <= before


def test_a_killed_node_is_dead_within_seconds_dropped_in_time_and_comes_back(
    five: list[Daemon],
) -> None:
    """Meanwhile one of the others is frozen for a moment, and another one restarts at once."""
    victim, others = five[3], five[:3] + five[4:]
    assert victim.name != leader_of(five).name
    victim.signal(signal.SIGKILL)
    wait_for(seen_by(others, victim.name, "dead"), "seen dead", 15)
    wait_for(lambda: agreed(others), "four agree", 30)
    check_short_freeze(others[2], [*others[:2], others[3]])
    check_restart(others[3], others[:3])
    # One that has just come back counts from when it was told.
    wait_for(seen_by(others, victim.name, None), "dropped", 75)
    victim.process.wait()
    victim.start()
    wait_for(lambda: agreed(five), "five again", 60)


def test_a_killed_leader_is_followed_and_its_plan_outlives_it(five: list[Daemon]) -> None:
    leader = leader_of(five)
    others = [daemon for daemon in five if daemon is not leader]
    before = {json.dumps(line) for line in _lines(others[0])}
    with clients(others) as failures:
        leader.signal(signal.SIGKILL)

        def followed() -> bool:
            leaders = {daemon.status()["leader"] for daemon in others}
            return len(leaders) == 1 and leaders <= {daemon.id for daemon in others}

        wait_for(followed, "a new leader", 20)
        wait_for(lambda: agreed(others), "four agree", 30)
    assert not failures
    after = {json.dumps(line) for line in _lines(others[0])}
    # The plan goes on without what the dead one held.
    assert after <= before
    leader.process.wait()
    leader.start()
    wait_for(lambda: agreed(five), "five again", 60)
    assert leader_of(five) is not leader


def _lines(daemon: Daemon) -> list[list[tuple[str, int, int]]]:
    status = daemon.status()
    return [[(s["node"], s["start"], s["end"]) for s in line] for line in pipelines(status)]


def test_both_sides_of_a_partition_answer_and_one_plan_is_left_after_it(
    five: list[Daemon],
) -> None:
    two, three = five[:2], five[2:]
    try:
        with clients(five) as failures:
            began = time.monotonic()
            partition(
                [d.machine for d in two if d.machine], [d.machine for d in three if d.machine]
            )
            for side in (two, three):
                wait_for(lambda side=side: agreed(side), f"{len(side)} agree", 30)  # type: ignore[misc]
            wait_for(lambda: time.monotonic() > began + 20, "20 s have passed")
        assert not failures
        assert agreed(two)
        assert agreed(three)
    finally:
        for daemon in five:
            assert daemon.machine
            daemon.machine.heal()
    wait_for(lambda: agreed(five), "one cluster", 40)


def test_a_long_freeze_is_a_death_and_then_a_clean_return(five: list[Daemon]) -> None:
    victim, others = five[1], [five[0], *five[2:]]
    identity = victim.id
    victim.signal(signal.SIGSTOP)
    wait_for(seen_by(others, victim.name, "dead"), "seen dead", 30)
    time_left = 20.0
    wait_for(lambda: agreed(others), "four agree", time_left)
    victim.signal(signal.SIGCONT)
    wait_for(lambda: agreed(five), "five again", 30)
    for daemon in five:
        found = [node["id"] for node in daemon.status()["nodes"] if node["name"] == victim.name]
        assert found == [identity]


def test_half_of_all_packets_lost_does_not_make_leaders_take_turns(five: list[Daemon]) -> None:
    marks = [len(daemon.log) for daemon in five]
    for daemon in five:
        assert daemon.machine
        daemon.machine.lose(50)
    until = time.monotonic() + 30
    history: list[list[str | None]] = [[] for _ in five]
    try:
        while time.monotonic() < until:
            for seen, daemon in zip(history, five, strict=True):
                seen.append(daemon.status()["leader"])
    finally:
        for daemon in five:
            assert daemon.machine
            daemon.machine.heal()
    wait_for(lambda: agreed(five), "five agree", 30)
    changes = [sum(a != b for a, b in itertools.pairwise(seen)) for seen in history]
    logs = [daemon.log[mark:] for daemon, mark in zip(five, marks, strict=True)]
    assert sum(log.count("leading the cluster in term") for log in logs) <= 1, logs
    assert max(changes) <= 1, (changes, history, logs)
