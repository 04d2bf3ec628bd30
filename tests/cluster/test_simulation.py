"""Behaviour of whole clusters in virtual time; see simulator.py."""

import pytest

from pxd.cluster.config import MembershipConfig
from tests.cluster.simulator import Simulator

CONFIG = MembershipConfig()


def settled(size: int, seed: int = 1, **more: object) -> tuple[Simulator, list[str]]:
    simulator = Simulator(seed, **more)  # type: ignore[arg-type]
    names = simulator.cluster(size)
    simulator.run(3)
    simulator.run_until(simulator.agreed, 15)
    return simulator, names


def deaths(simulator: Simulator) -> list[float]:
    return [when for process in simulator.processes.values() for when in process.happened("died")]


def suspicions(simulator: Simulator) -> list[float]:
    return [
        when for process in simulator.processes.values() for when in process.happened("suspected")
    ]


def all_see(simulator: Simulator, node: str, state: str) -> bool:
    return all(
        process.states().get(node) == state
        for name, process in simulator.processes.items()
        if name != node
    )


@pytest.mark.parametrize("size", [1, 2, 3, 10])
def test_nodes_that_join_through_one_find_each_other(size: int) -> None:
    simulator, names = settled(size)
    assert simulator.in_office() == [names[0]]
    assert not suspicions(simulator)


def test_nobody_is_suspected_without_faults() -> None:
    simulator, _ = settled(10)
    simulator.run(120)
    assert not suspicions(simulator)
    assert simulator.agreed()


def test_lossy_links_bury_nobody() -> None:
    simulator, _ = settled(8, loss=0.05, duplication=0.05, latency=(0.001, 0.2))
    simulator.run(120)
    assert not deaths(simulator)
    simulator.loss = 0.0
    simulator.run_until(simulator.agreed, 20)


@pytest.mark.parametrize("size", [2, 3, 10])
def test_a_crash_is_suspected_at_once_and_certain_within_seconds(size: int) -> None:
    simulator, names = settled(size)
    victim = names[-1]
    simulator.run(20)
    simulator.crash(victim)
    assert simulator.run_until(lambda: all_see(simulator, victim, "suspect"), 5) < 1
    assert simulator.run_until(lambda: all_see(simulator, victim, "dead"), 10) < 5


def test_a_frozen_node_is_found_out_and_comes_back_blaming_nobody() -> None:
    simulator, names = settled(5)
    victim = names[2]
    simulator.freeze(victim)
    others = [simulator.processes[name] for name in names if name != victim]
    simulator.run_until(lambda: all(p.states()[victim] == "dead" for p in others), 12)
    simulator.run(20)
    simulator.thaw(victim)
    simulator.run_until(simulator.agreed, 10)
    assert not simulator.processes[victim].happened("suspected")
    assert all(len(process.happened("joined", victim)) == 2 for process in others)


def test_a_short_freeze_costs_no_more_than_a_suspicion() -> None:
    simulator, names = settled(5)
    simulator.freeze(names[2])
    simulator.run(3.5)
    simulator.thaw(names[2])
    simulator.run(15)
    assert suspicions(simulator)
    assert not deaths(simulator)
    assert simulator.agreed()


def test_one_silent_direction_between_two_nodes_hurts_nobody() -> None:
    simulator, names = settled(5)
    simulator.block(names[1], names[2])
    simulator.run(60)
    assert not suspicions(simulator)


def test_a_lost_connection_between_living_nodes_is_made_again() -> None:
    simulator, _ = settled(2)
    simulator.drop_connections()
    simulator.run(10)
    assert not suspicions(simulator)
    assert simulator.connections()


@pytest.mark.parametrize("size", [2, 10])
def test_a_goodbye_is_known_within_a_second_and_hands_over_the_lead(size: int) -> None:
    simulator, names = settled(size)
    simulator.leave(names[0])
    rest = [simulator.processes[name] for name in names[1:]]
    simulator.run_until(lambda: all(p.states()[names[0]] == "left" for p in rest), 1)
    simulator.run_until(simulator.agreed, 0.1)
    assert simulator.in_office() == [names[1]]
    simulator.run(30)
    assert not suspicions(simulator)


def test_the_lead_passes_on_once_when_the_leader_dies() -> None:
    simulator, names = settled(6)
    term = simulator.processes[names[1]].leadership.term
    simulator.crash(names[0])
    simulator.run_until(simulator.agreed, 8)
    assert simulator.in_office() == [names[1]]
    simulator.run(30)
    assert {p.leadership.term for p in simulator.processes.values()} == {term + 1}


@pytest.mark.parametrize("pause", [0.2, 2.0, 20.0])
@pytest.mark.parametrize("keep_data", [True, False])
def test_a_restarted_node_is_the_same_member(pause: float, keep_data: bool) -> None:
    simulator, names = settled(5)
    victim = names[3]
    simulator.crash(victim)
    simulator.run(pause)
    simulator.start(victim, names[0], keep_data=keep_data)
    simulator.run_until(simulator.agreed, 10)
    simulator.run(3)
    others = [simulator.processes[name] for name in names if name != victim]
    for process in others:
        returns = 2 if process.happened("died", victim) else 1
        assert len(process.happened("joined", victim)) == returns
        assert process.membership.members[victim].record == (
            simulator.processes[victim].membership.record
        )
    simulator.run(CONFIG.drop_after + 30)
    assert simulator.agreed()


def test_a_leader_that_restarts_does_not_take_the_lead_back() -> None:
    simulator, names = settled(3)
    simulator.crash(names[0])
    simulator.run(10)
    simulator.start(names[0], names[1])
    simulator.run_until(simulator.agreed, 10)
    assert simulator.in_office() == [names[1]]


def test_the_gone_are_dropped_and_leave_no_ghosts() -> None:
    simulator, names = settled(6)
    simulator.crash(names[4])
    simulator.leave(names[5])
    simulator.run(CONFIG.drop_after + 12)
    for process in simulator.processes.values():
        assert set(process.states()) == set(names[:4])
        assert len(process.happened("dropped")) == 2
    simulator.run(CONFIG.drop_after)
    assert all(set(p.states()) == set(names[:4]) for p in simulator.processes.values())


def test_a_member_that_missed_a_death_does_not_bring_the_dead_back() -> None:
    simulator, names = settled(5)
    dead, cut_off, rest = names[4], names[3], names[:3]
    simulator.partition(rest, [cut_off])
    simulator.crash(dead)
    # Frozen as well, so that it still believes the dead alive when it returns.
    simulator.freeze(cut_off)
    simulator.run(CONFIG.drop_after + 12)
    assert all(dead not in simulator.processes[name].states() for name in rest)
    simulator.heal()
    simulator.thaw(cut_off)
    newcomer = simulator.start("newcomer", cut_off)
    simulator.run_until(simulator.agreed, 30)
    assert all(len(simulator.processes[name].happened("joined", dead)) == 1 for name in rest)
    assert dead not in newcomer.live()


@pytest.mark.parametrize("length", [5.0, 30.0, 150.0])
@pytest.mark.parametrize("seed", [1, 2])
def test_a_healed_partition_agrees_again(length: float, seed: int) -> None:
    simulator, names = settled(7, seed)
    simulator.partition(names[:3], names[3:])
    simulator.run(length)
    if length >= 30:
        assert simulator.in_office() == [names[0], names[3]]
    took = dict.fromkeys(names, 0)
    for name in names:
        took[name] = simulator.processes[name].terms_taken()
    simulator.heal()
    simulator.run_until(simulator.agreed, 60)
    simulator.run(20)
    assert simulator.agreed()
    # The later term goes on: a leader that was followed does not take the lead back.
    [name] = simulator.in_office()
    assert name == (names[3] if length >= 30 else names[0])
    leader = simulator.processes[name].leadership
    assert {p.leadership.term for p in simulator.processes.values()} == {leader.leads}
    assert sum(simulator.processes[n].terms_taken() - took[n] for n in names) <= 2


def test_messages_per_node_do_not_grow_with_the_cluster() -> None:
    def rates(size: int) -> tuple[float, float]:
        simulator, names = settled(size)
        simulator.run(5)
        simulator.sent.clear()
        simulator.run(15)
        assert not suspicions(simulator)
        per_node = [simulator.sent[name] / 15 for name in names]
        return sum(per_node) / size, max(per_node)

    small, _ = rates(10)
    large, busiest = rates(100)
    assert large < 2 * small
    assert busiest < 4 * small


def test_the_same_seed_replays_exactly() -> None:
    def history(seed: int) -> list[object]:
        simulator, names = settled(4, seed, loss=0.1, duplication=0.1)
        simulator.crash(names[1])
        simulator.run(10)
        return [(name, simulator.processes[name].events) for name in names if name != names[1]]

    assert history(3) == history(3)
    assert history(3) != history(4)
