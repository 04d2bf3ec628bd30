"""Nodes that this one keeps out: gone at once, and no gossip brings them back."""

import pytest

from pxd.cluster.messages import Claim, Delta, Digest, DigestEntry, Ping

from .simulator import Simulator
from .single import kinds, left, member, news, record, sent, tell


def test_an_expelled_member_is_gone_at_once_and_for_good() -> None:
    membership = member(record("a"), record("b"))
    membership.expel(1.0, frozenset({"a"}))
    assert set(membership.members) == {"me", "b"}
    assert kinds(membership) == [("left", "a"), ("dropped", "a")]
    membership.receive(2.0, "b", news(record("a", 9)))
    tell(membership, Claim("a", "suspect", 9, "b"), now=2.0, by="b")
    membership.receive(2.0, "a", Ping(seq=1, news=news(record("a", 9)).news))
    membership.connected("a")
    assert set(membership.members) == {"me", "b"}
    assert kinds(membership) == []
    assert "a" not in {peer for peer, _ in membership.take_outbox()}


def test_records_of_the_expelled_are_not_asked_for() -> None:
    membership = member(record("b"))
    membership.expel(0.0, frozenset({"a"}))
    entries = (DigestEntry("a", (5, 0), "alive", 5), DigestEntry("c", (5, 0), "alive", 5))
    membership.receive(1.0, "b", Digest(after=None, until=None, entries=entries))
    asked = [node for _, delta in sent(membership, Delta) for node in delta.wants]  # type: ignore[attr-defined]
    assert asked == ["c"]


def test_who_is_let_in_again_comes_back_with_its_next_word() -> None:
    membership = member(record("a"), record("b"))
    membership.expel(0.0, frozenset({"a"}))
    membership.expel(1.0, frozenset())
    membership.take_events()
    membership.receive(2.0, "a", news(record("a", 1)))
    assert kinds(membership) == [("joined", "a")]


@pytest.mark.parametrize("claim", [Claim("a", "suspect", 1, "b"), left("a")], ids=lambda c: c.state)
def test_a_node_that_is_doubted_or_gone_is_expelled_too(claim: Claim) -> None:
    membership = member(record("a"), record("b"))
    tell(membership, claim)
    membership.take_events()
    membership.expel(1.0, frozenset({"a", "unheard of"}))
    assert "a" not in membership.members
    assert kinds(membership)[-1] == ("dropped", "a")


def test_a_node_does_not_expel_itself() -> None:
    membership = member(record("a"))
    membership.expel(0.0, frozenset({"me"}))
    assert set(membership.members) == {"me", "a"}
    assert kinds(membership) == []


def test_a_cluster_that_expels_a_node_stays_one_cluster_without_it() -> None:
    simulator = Simulator(seed=3)
    names = simulator.cluster(5)
    simulator.run_until(simulator.agreed, 30)
    outcast, *others = names
    for name in others:
        process = simulator.processes[name]
        process.expel(frozenset({outcast}))
        process.drain()
    simulator.run(60)
    for name in others:
        assert set(simulator.processes[name].membership.members) == set(others)
