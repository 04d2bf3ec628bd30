import pytest

from pxd.cluster.config import MembershipConfig
from pxd.cluster.suspicion import Suspicion
from tests.cluster.single import member, record, run_answered

CONFIG = MembershipConfig(
    probe_interval=1.0, suspicion_factor=3.0, suspicion_spread=2.0, confirmations=2
)


def length(members: int, *accusers: str) -> float:
    suspicion = Suspicion(1, started=100.0)
    for accuser in accusers:
        suspicion.confirm(accuser, CONFIG)
    return suspicion.deadline(members, CONFIG) - 100.0


def test_it_lasts_longer_in_larger_clusters() -> None:
    assert length(10, "a", "b", "c") == pytest.approx(3.0)
    assert length(100, "a", "b", "c") == pytest.approx(6.0)
    assert length(1000, "a", "b", "c") == pytest.approx(9.0)


def test_confirmations_shorten_it() -> None:
    assert length(10, "a") == pytest.approx(6.0)
    assert 3.0 < length(10, "a", "b") < 6.0
    assert length(10, "a", "b", "c") == pytest.approx(3.0)


def test_one_accuser_counts_once() -> None:
    assert length(10, "a", "a", "a", "a") == length(10, "a")


def test_nobody_waits_for_confirmations_that_cannot_come() -> None:
    assert length(3, "a") == pytest.approx(3.0)
    assert length(2, "a") == pytest.approx(3.0)


def test_only_confirmations_that_matter_are_passed_on() -> None:
    suspicion = Suspicion(1, started=0.0)
    assert [suspicion.confirm(accuser, CONFIG) for accuser in "abbcd"] == [
        True,
        True,
        False,
        True,
        False,
    ]


def others(node: str) -> bool:
    return node != "a"


def test_where_nobody_listens_any_more_death_is_soon_certain() -> None:
    membership = member(record("a"), *(record(f"n{i}") for i in range(6)))
    membership.connected("a")
    membership.disconnected(1.0, "a")
    membership.vanished(1.1, "a")
    run_answered(membership, 1.6, others)
    assert membership.members["a"].state == "suspect"
    run_answered(membership, 2.2, others)
    assert membership.members["a"].state == "dead"
    assert membership.members["a"].vanished


def test_silence_alone_takes_longer_and_leaves_a_doubt() -> None:
    membership = member(record("a"), *(record(f"n{i}") for i in range(6)))
    membership.connected("a")
    membership.disconnected(1.0, "a")
    run_answered(membership, 3.4, others)
    assert membership.members["a"].state == "suspect"
    run_answered(membership, 8.0, others)
    assert membership.members["a"].state == "dead"
    assert not membership.members["a"].vanished


def test_one_that_others_reach_elsewhere_is_not_suspected_for_a_closed_door() -> None:
    membership = member(record("a"), *(record(f"n{i}") for i in range(6)))
    membership.vanished(1.0, "a")
    run_answered(membership, 10.0)
    assert membership.members["a"].state == "alive"
    # Much later that is no evidence any more.
    membership.connected("b")
    membership.disconnected(20.0, "a")
    run_answered(membership, 22.4, others)
    assert membership.members["a"].state == "suspect"


def test_what_is_asked_after_a_freeze_is_not_put_off() -> None:
    membership = member(record("a"), *(record(f"n{i}") for i in range(6)))
    membership.connected("a")
    run_answered(membership, 3.0)
    # Frozen for a minute; the first thing that it hears is that a connection is gone.
    membership.disconnected(63.0, "a")
    membership.tick(63.0)
    run_answered(membership, 65.0, others)
    assert membership.members["a"].state == "suspect"
