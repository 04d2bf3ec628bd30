import pytest

from pxd.cluster.config import MembershipConfig
from pxd.cluster.suspicion import Suspicion

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
