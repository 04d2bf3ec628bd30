"""Many nodes in virtual time, and what grows with their number.

`scripts/simulate` measures more at 1,000 nodes than CI has time for.
"""

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
MEDIUM = 200
LOSS = 0.01

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def medium() -> Iterator[Scenario]:
    scenario = Scenario(MEDIUM, loss=LOSS, seed=1)
    scenario.settle()
    yield scenario
    # Whatever happened to it, nobody was buried who was there.
    assert scenario.false_deaths == 0


def test_a_death_is_known_to_a_thousand_in_time() -> None:
    """The bound is the suspicion timeout of memberlist at its LAN defaults, SuspicionMult *
    max(1, log10(N)) * ProbeInterval with 4 and 1 s, once, and 3 probe intervals to find the death
    and to spread it: 15 s for 1,000 nodes, where 3 times the timeout would be 36 s."""
    scenario = Scenario(LARGE, loss=LOSS, seed=1)
    scenario.settle()
    death = scenario.lose_power()
    assert death.suspected_s < 3 * MEMBERLIST_PROBE_INTERVAL
    assert death.everywhere_s < memberlist_suspicion(LARGE) + 3 * MEMBERLIST_PROBE_INTERVAL
    assert scenario.false_deaths == 0


def test_a_crash_is_suspected_at_once(medium: Scenario) -> None:
    death = medium.crash()
    assert death.suspected_s < MEMBERLIST_PROBE_INTERVAL
    assert death.everywhere_s < memberlist_suspicion(MEDIUM) + MEMBERLIST_PROBE_INTERVAL


def test_gossip_costs_a_node_as_much_among_hundreds_as_among_ten(medium: Scenario) -> None:
    few = Scenario(10, loss=LOSS, seed=1)
    few.settle()
    small, large = few.traffic(300), medium.traffic(60)
    assert large.messages < 1.5 * small.messages
    assert large.busiest_messages < 3 * small.messages
    # Records that full synchronisation brings come on top of pings.
    assert large.bytes < 3 * small.bytes + 1000


def test_a_tenth_may_restart_at_once(medium: Scenario) -> None:
    restarted, took, _ = medium.restart()
    assert restarted == MEDIUM // 10
    assert took < 30


def test_nobody_dies_and_nobody_is_suspected_without_faults() -> None:
    scenario = Scenario(MEDIUM, loss=0.0, seed=2)
    scenario.settle()
    scenario.traffic(60)
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
