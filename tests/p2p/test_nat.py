"""Members behind the routers of two homes, and relays that all can reach."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pxd.p2p import punch
from tests.netns import homes, lan, needs_netns, partition, wait_home
from tests.p2p.remote import RelayProcess, Remote

pytestmark = [pytest.mark.alone, needs_netns]


@pytest.fixture(scope="module", autouse=True)
def threads_go_home() -> Iterator[None]:
    yield
    wait_home()


def wait_for(condition: Callable[[], object], what: str, within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.02)


@contextmanager
def family(
    directory: Path, *symmetric: bool, relays: int = 1
) -> Iterator[tuple[list[Remote], list[RelayProcess]]]:
    """One member per home; each knows the relays, and what the others say of their addresses."""
    middle: list[RelayProcess] = []
    ends: list[Remote] = []
    with homes(*symmetric) as (private, public):
        try:
            for seed, machine in enumerate(public[:relays], 1):
                middle.append(RelayProcess(machine, directory, seed))
            known = [relay.address for relay in middle]
            for seed, machine in enumerate(private, 11):
                ends.append(Remote(machine, directory, seed, *known))
            for end in ends:
                for relay in middle:
                    assert end.call(relay) == "hi"
                for other in ends:
                    end.do(end.network.learn, other.id, (other.address,))
                end.do(end.network.use_relays, frozenset(relay.id for relay in middle))
            yield ends, middle
        finally:
            for end in ends:
                end.stop()
            for relay in middle:
                relay.kill()


def test_members_behind_two_routers_meet_at_a_relay_and_then_directly(tmp_path: Path) -> None:
    with family(tmp_path, False, False) as ([a, b], [relay]):
        assert a.call(b) == "hi"
        wait_for(lambda: a.path(b) == b.path(a) == "punched", "a direct connection")
        assert b.call(a, "without the relay") == "without the relay"
        relay.kill()
        assert a.call(b, "x" * 1_000_000) == "x" * 1_000_000
        assert a.path(b) == "punched"


@pytest.mark.parametrize("other", [False, True])
def test_a_router_that_gives_every_connection_another_port_needs_the_relay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch, other: bool
) -> None:
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 0.5)
    with caplog.at_level(logging.INFO, "pxd.p2p"), family(tmp_path, True, other) as ([a, b], _):
        assert a.call(b) == "hi"
        wait_for(lambda: "no direct connection with" in caplog.text, "it says so")
        assert a.path(b) == b.path(a) == "relayed"
        assert b.call(a, "x" * 1_000_000) == "x" * 1_000_000


def test_when_a_relay_is_killed_another_one_carries_on(tmp_path: Path) -> None:
    with family(tmp_path, True, True, relays=2) as ([a, b], relays):
        assert a.call(b) == "hi"
        route = a.route(b)
        assert route
        [used] = [relay for relay in relays if relay.id == route.relay]
        [other] = [relay for relay in relays if relay is not used]
        used.kill()

        def carried() -> bool:
            route = a.route(b)
            return route is not None and route.relay == other.id

        wait_for(carried, "the other relay passes it on")
        assert a.call(b, "x" * 1_000_000) == "x" * 1_000_000
        assert b.call(a) == "hi"


def test_a_way_that_opens_later_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(punch, "FIRST_DELAY", 0.2)
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 0.5)
    with lan(["relay", "a", "b"]) as (middle, *machines):
        relay = RelayProcess(middle, tmp_path, 1)
        ends: list[Remote] = []
        try:
            for seed, machine in enumerate(machines, 11):
                ends.append(Remote(machine, tmp_path, seed, relay.address))
            a, b = ends
            partition([machines[0]], [machines[1]])
            for one, other in ((a, b), (b, a)):
                assert one.call(relay) == "hi"
                one.do(one.network.learn, other.id, (other.address,))
                one.do(one.network.use_relays, frozenset({relay.id}))
            assert a.call(b) == "hi"
            assert a.path(b) == b.path(a) == "relayed"
            for machine in machines:
                machine.heal()
            wait_for(lambda: a.path(b) == b.path(a) == "direct", "they are connected directly")
        finally:
            for end in ends:
                end.stop()
            relay.kill()
