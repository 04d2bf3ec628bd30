"""A thousand nodes in virtual time, and what grows with their number."""

from collections.abc import Iterator

import pytest

from tests.cluster.scenarios import (
    MEMBERLIST_PROBE_INTERVAL,
    Scenario,
    measure,
    memberlist_suspicion,
)
from tests.cluster.simulate import table

LARGE = 1000
LOSS = 0.01

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def crowd() -> Iterator[Scenario]:
    scenario = Scenario(LARGE, loss=LOSS, seed=1)
    scenario.settle()
    yield scenario
    # Whatever happened to it, nobody was buried who was there.
    assert scenario.false_deaths == 0


def bound(nodes: int) -> float:
    """Seconds within which a death has to be known everywhere.

    The suspicion timeout that memberlist would grant, SuspicionMult * max(1, log10(N)) *
    ProbeInterval with 4 and 1 s, once, and 3 probe intervals to find the death and to spread it.
    That is stricter than 3 times the timeout.
    """
    return memberlist_suspicion(nodes) + 3 * MEMBERLIST_PROBE_INTERVAL


def test_gossip_costs_a_node_as_much_among_a_thousand_as_among_ten(crowd: Scenario) -> None:
    few = Scenario(10, loss=LOSS, seed=1)
    few.settle()
    small, large = few.traffic(300), crowd.traffic(60)
    assert large.messages < 1.5 * small.messages
    assert large.busiest_messages < 3 * small.messages
    # Records and summaries come on top of pings, and both are short beside what TCP adds.
    assert large.bytes < 3 * small.bytes + 500


def test_a_node_without_power_is_dead_to_everybody_in_time(crowd: Scenario) -> None:
    death = crowd.lose_power()
    assert death.suspected_s < 3 * MEMBERLIST_PROBE_INTERVAL
    assert death.everywhere_s < bound(LARGE)


def test_a_crash_is_known_to_everybody_in_time(crowd: Scenario) -> None:
    death = crowd.crash()
    assert death.suspected_s < MEMBERLIST_PROBE_INTERVAL
    assert death.everywhere_s < bound(LARGE)


def test_a_tenth_may_restart_at_once(crowd: Scenario) -> None:
    restarted, took, _ = crowd.restart()
    assert restarted == LARGE // 10
    assert took < 30


def test_nobody_dies_and_nobody_is_suspected_without_faults() -> None:
    scenario = Scenario(300, loss=0.0, seed=2)
    scenario.settle()
    scenario.traffic(120)
    assert (scenario.false_deaths, scenario.false_suspicions) == (0, 0)
    assert scenario.offices == 1
    assert scenario.simulator.agreed()


def test_the_table_shows_every_size_and_the_growth() -> None:
    found = [measure(n, loss=0.0, seed=1, quiet_s=20, say=lambda _: None) for n in (4, 40)]
    lines = list(table(found))
    assert lines[1].split() == ["nodes", "4", "40"]
    [messages] = [line for line in lines if line.startswith("messages per node")]
    assert f"{found[0].quiet.messages:.4g}" in messages
    assert "(x " in messages
