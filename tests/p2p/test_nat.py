"""Members behind the routers of two homes, and relays that all can reach."""

import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from pxd.p2p import punch
from tests.netns import homes, needs_netns
from tests.p2p.remote import Remote

pytestmark = needs_netns


def wait_for(condition: Callable[[], object], what: str, within: float = 30.0) -> None:
    deadline = time.monotonic() + within
    while not condition():
        assert time.monotonic() < deadline, f"not within {within:g} s: {what}"
        time.sleep(0.02)


@contextmanager
def family(
    directory: Path, *symmetric: bool, relays: int = 1
) -> Iterator[tuple[list[Remote], list[Remote]]]:
    """One member per home; each knows the relays, and what the others say of their addresses."""
    made: list[Remote] = []
    with homes(*symmetric) as (private, public):
        try:
            for seed, machine in enumerate(public[:relays], 1):
                made.append(Remote(machine, directory, seed, relay=True))
            known = [relay.address for relay in made]
            for seed, machine in enumerate(private, 11):
                made.append(Remote(machine, directory, seed, *known))
            middle, ends = made[:relays], made[relays:]
            for end in ends:
                for relay in middle:
                    assert end.call(relay) == "hi"
                for other in ends:
                    end.do(end.network.learn, other.id, (other.address,))
                end.do(end.network.use_relays, frozenset(relay.id for relay in middle))
            yield ends, middle
        finally:
            for remote in made:
                remote.stop()


def test_members_behind_two_routers_meet_at_a_relay_and_then_directly(tmp_path: Path) -> None:
    with family(tmp_path, False, False) as ([a, b], [relay]):
        assert a.call(b) == "hi"
        wait_for(lambda: a.path(b) == b.path(a) == "punched", "a direct connection")
        assert b.call(a, "without the relay") == "without the relay"
        relay.stop()
        assert a.call(b, "x" * 1_000_000) == "x" * 1_000_000
        assert a.path(b) == "punched"


def test_a_router_that_gives_every_connection_another_port_needs_the_relay(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(punch, "ROUND_TIMEOUT", 1.0)
    with caplog.at_level(logging.INFO, "pxd.p2p"), family(tmp_path, True, True) as ([a, b], _):
        assert a.call(b) == "hi"
        wait_for(lambda: "no direct connection with" in caplog.text, "it says so")
        assert a.path(b) == b.path(a) == "relayed"
        assert b.call(a, "x" * 1_000_000) == "x" * 1_000_000
