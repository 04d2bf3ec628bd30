"""What befalls the nodes of scripts/chaos is up to the seed alone, and leaves enough of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from scripts.disorder.schedule import (
    CAPACITIES,
    KINDS,
    LAYERS,
    RULES,
    Fault,
    Kind,
    schedule,
)

SOME_KINDS = st.sets(st.sampled_from(KINDS))
NODES = st.sampled_from(sorted(CAPACITIES))
SECONDS = st.floats(0, 600)


@given(st.integers(), SECONDS, NODES, SOME_KINDS)
def test_a_schedule_keeps_its_promises(
    seed: int, seconds: float, nodes: int, kinds: set[Kind]
) -> None:
    capacities = CAPACITIES[nodes]
    faults = schedule(seed, seconds, capacities, LAYERS, kinds)
    assert list(faults) == sorted(faults, key=lambda fault: fault.at)
    for number, fault in enumerate(faults):
        least, most = RULES[fault.kind].lasting
        assert fault.kind in kinds
        assert least <= fault.lasting <= most
        assert fault.at + fault.lasting <= seconds
        assert bool(fault.places) == (fault.kind != "model")
        going_on = [other for other in faults[:number] if other.over > fault.at]
        busy = [place for other in going_on for place in other.places]
        assert not set(busy).intersection(fault.places)
        out = [f for f in (*going_on, fault) if RULES[f.kind].out]
        gone = {place for other in out for place in other.places}
        assert sum(c for place, c in enumerate(capacities) if place not in gone) >= LAYERS
        if RULES[fault.kind].alone:
            assert fault.kind not in [other.kind for other in going_on]


@given(st.integers(), SECONDS, NODES, SOME_KINDS)
def test_a_seed_gives_one_schedule(seed: int, seconds: float, nodes: int, kinds: set[Kind]) -> None:
    def make(order: list[Kind]) -> tuple[Fault, ...]:
        return schedule(seed, seconds, CAPACITIES[nodes], LAYERS, order)

    assert make(sorted(kinds)) == make(sorted(kinds, reverse=True))


@pytest.mark.parametrize("nodes", CAPACITIES)
def test_everything_happens_in_time_and_to_everybody(nodes: int) -> None:
    faults = schedule(1, 600, CAPACITIES[nodes], LAYERS, KINDS)
    assert {fault.kind for fault in faults} == set(KINDS)
    assert {place for fault in faults for place in fault.places} == set(range(nodes))
    assert faults != schedule(2, 600, CAPACITIES[nodes], LAYERS, KINDS)


@pytest.mark.parametrize("nodes", CAPACITIES)
def test_there_is_room_for_two_pipelines(nodes: int) -> None:
    """And no node is too much for them."""
    capacities = CAPACITIES[nodes]
    assert len(capacities) == nodes
    sums = {0}
    for capacity in capacities:
        sums |= {capacity + some for some in sums}
    assert any(some >= LAYERS and sum(capacities) - some >= LAYERS for some in sums)
    assert sum(capacities) - max(capacities) >= LAYERS
