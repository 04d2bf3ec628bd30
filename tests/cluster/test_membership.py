"""Single rules of membership, message by message. Whole clusters: test_simulation.py."""

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.anti_entropy import compare, deltas, digests
from pxd.cluster.membership import Membership
from pxd.cluster.messages import (
    MAX_MESSAGE,
    Ack,
    Claim,
    Delta,
    Digest,
    DigestEntry,
    News,
    Ping,
    PingRequest,
    Summary,
)
from pxd.cluster.records import NodeRecord, StageReport
from tests.cluster.single import (
    CONFIG,
    kinds,
    left,
    member,
    membership_of,
    news,
    record,
    sent,
    table_of,
    tell,
)
from tests.signers import signed


def test_a_change_raises_the_version_and_no_change_does_not() -> None:
    membership = member()
    membership.update(memory=5)
    assert membership.record.order == (1, 1)
    membership.update(memory=5)
    assert membership.record.order == (1, 1)
    assert kinds(membership) == [("updated", "me")]


@pytest.mark.parametrize("field", ["id", "incarnation", "version"])
def test_what_the_protocol_sets_cannot_be_updated(field: str) -> None:
    with pytest.raises(ValueError, match=field):
        member().update(**{field: 7})


def test_only_newer_records_replace_older_ones() -> None:
    membership = member(record("a", 2, 5, memory=1))
    membership.receive(0.0, "a", news(record("a", 2, 4, memory=2)))
    membership.receive(0.0, "a", news(record("a", 1, 9, memory=3)))
    assert membership.members["a"].record.memory == 1
    membership.receive(0.0, "a", news(record("a", 2, 6, memory=4)))
    assert membership.members["a"].record.memory == 4
    assert kinds(membership) == [("updated", "a")]


def test_suspicion_of_oneself_is_refuted_and_told() -> None:
    membership = member(record("a"))
    tell(membership, Claim("me", "suspect", 1, "a"))
    assert membership.record.incarnation == 2
    assert kinds(membership) == [("refuted", "me")]
    tell(membership, Claim("me", "dead", 1, "a"))
    assert membership.record.incarnation == 2, "that claim is about a life long refuted"
    tell(membership, left("me", 8, "a"))
    assert membership.record.incarnation == 9, "it has said that in a life that it has forgotten"
    membership.tick(1.0)
    gossiped = [
        told
        for _, message in membership.take_outbox()
        if isinstance(message, Ping | Delta)
        for told in message.news.records
    ]
    assert signed(membership.record) in gossiped


@pytest.mark.parametrize(
    "foreign",
    [record("me", 4, 0), record("me", 1, 7), record("me", 1, 0, memory=7)],
    ids=["later life", "later version", "other content"],
)
def test_nobody_else_can_change_the_own_record(foreign: NodeRecord) -> None:
    membership = member()
    membership.receive(0.0, "a", news(foreign))
    assert membership.record.incarnation == foreign.incarnation + 1
    assert membership.record.memory == 0


def test_the_own_record_coming_back_is_no_contradiction() -> None:
    membership = member()
    membership.receive(0.0, "a", news(membership.record))
    assert membership.record.incarnation == 1


def test_a_digest_with_a_later_own_life_is_contradicted() -> None:
    membership = member()
    entry = DigestEntry("me", (6, 0), "alive", 6)
    membership.receive(0.0, "a", Digest(after=None, until=None, entries=(entry,)))
    assert membership.record.incarnation == 1, "anybody can say so"
    ((peer, answer),) = membership.take_outbox()
    assert peer == "a"
    assert isinstance(answer, Delta)
    assert answer.wants == ("me",)
    membership.receive(0.1, "a", news(record("me", 6)))
    assert membership.record.incarnation == 7


def test_a_suspect_recovers_with_a_greater_incarnation_only() -> None:
    membership = member(record("a", 3))
    tell(membership, Claim("a", "suspect", 3, "b"))
    membership.receive(0.0, "a", news(record("a", 3, 1, memory=9)))
    assert membership.members["a"].state == "suspect"
    assert membership.members["a"].record.memory == 9
    membership.receive(0.0, "a", news(record("a", 4)))
    assert membership.members["a"].state == "alive"
    assert kinds(membership) == [("suspected", "a"), ("updated", "a"), ("recovered", "a")]


def test_a_death_by_hearsay_is_only_a_suspicion() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "dead", 1, "b"))
    assert membership.members["a"].state == "suspect"


def test_claims_of_a_past_life_are_ignored() -> None:
    membership = member(record("a", 3))
    tell(membership, Claim("a", "suspect", 2, "b"), Claim("a", "left", 2, "a"))
    assert membership.members["a"].state == "alive"


def test_a_goodbye_counts_at_once_and_a_return_needs_a_new_life() -> None:
    membership = member(record("a"))
    tell(membership, left("a"), now=3.0)
    assert membership.members["a"].state == "left"
    assert membership.members["a"].since == 3.0
    membership.receive(4.0, "b", news(record("a", 1, 50)))
    assert membership.members["a"].state == "left"
    membership.receive(5.0, "a", news(record("a", 2)))
    assert membership.members["a"].state == "alive"
    assert kinds(membership) == [("left", "a"), ("joined", "a")]


def test_claims_about_strangers_mean_nothing() -> None:
    membership = member()
    tell(membership, Claim("ghost", "suspect", 1, "b"), Claim("ghost", "dead", 1, "b"))
    assert set(membership.members) == {"me"}


def test_a_dropped_node_stays_away_until_it_shows_a_new_life() -> None:
    membership = member(record("a"))
    tell(membership, left("a"))
    membership.tick(CONFIG.drop_after)
    assert "a" not in membership.members
    membership.take_outbox()
    membership.receive(100.0, "late", news(record("a", 1, 3)))
    assert "a" not in membership.members
    ((peer, answer),) = membership.take_outbox()
    assert peer == "late"
    assert isinstance(answer, Delta)
    assert answer.news.claims == (left("a", by="me"),)
    membership.receive(101.0, "a", news(record("a", 2)))
    assert membership.members["a"].state == "alive"


def test_a_tombstone_is_forgotten_in_the_end() -> None:
    membership = member(record("a"), record("b"), tombstone_for=10.0)
    tell(membership, left("a"))
    membership.tick(CONFIG.drop_after)
    tell(membership, left("b"), now=70.0)
    membership.tick(70.0 + CONFIG.drop_after)
    membership.receive(140.0, "late", news(record("a"), record("b")))
    assert "a" in membership.members
    assert "b" not in membership.members


def test_an_ack_counts_only_from_the_one_asked() -> None:
    membership = member(record("a"), record("b"), record("c"))
    membership.disconnected(0.0, "a")
    pings = sent(membership, Ping)
    assert [peer for peer, _ in pings] == ["a"]
    ping = pings[0][1]
    assert isinstance(ping, Ping)
    membership.receive(0.1, "teller", Ack(seq=ping.seq, news=News()))
    membership.tick(CONFIG.lost_timeout)
    assert membership.members["a"].state == "suspect"


@pytest.mark.parametrize("witness", ["a", "b"])
def test_an_ack_from_the_target_or_through_a_helper_clears_it(witness: str) -> None:
    membership = member(record("a"), record("b"))
    membership.disconnected(0.0, "a")
    (request,) = sent(membership, PingRequest)
    assert request[0] == "b"
    assert isinstance(request[1], PingRequest)
    membership.receive(0.1, witness, Ack(seq=request[1].seq, news=News()))
    membership.tick(CONFIG.lost_timeout)
    assert membership.members["a"].state == "alive"


def test_a_ping_for_somebody_else_is_passed_on_and_its_ack_back() -> None:
    membership = member(record("target"))
    membership.receive(0.0, "asker", PingRequest(seq=77, target="target", news=News()))
    ((peer, ping),) = sent(membership, Ping)
    assert peer == "target"
    assert isinstance(ping, Ping)
    membership.receive(0.1, "liar", Ack(seq=ping.seq, news=News()))
    assert not sent(membership, Ack)
    membership.receive(0.1, "target", Ack(seq=ping.seq, news=News()))
    ((peer, ack),) = sent(membership, Ack)
    assert peer == "asker"
    assert isinstance(ack, Ack)
    assert ack.seq == 77


def test_whoever_is_not_alive_hears_so_with_every_message() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    membership.take_outbox()
    membership.receive(0.0, "a", Ping(seq=5, news=News()))
    ((_, ack),) = sent(membership, Ack)
    assert isinstance(ack, Ack)
    assert Claim("a", "suspect", 1, "me") in ack.news.claims


def test_round_trip_times_are_smoothed_and_only_measured_on_connections() -> None:
    membership = member(record("a"))
    assert measured(membership, 1.0, 0.5) is None
    membership.connected("a")
    assert measured(membership, 3.0, 0.010) == pytest.approx(0.010)
    assert measured(membership, 5.0, 0.020) == pytest.approx(0.012)


def measured(membership: Membership, now: float, delay: float) -> float | None:
    membership.take_outbox()
    membership.tick(now)
    ((peer, ping),) = sent(membership, Ping)
    assert isinstance(ping, Ping)
    membership.receive(now + delay, peer, Ack(seq=ping.seq, news=News()))
    return membership.members[peer].rtt


def test_leaving_says_goodbye_to_the_connected_and_goes_silent() -> None:
    membership = member(record("a"), record("b"), record("c"))
    membership.connected("a")
    membership.connected("b")
    membership.take_outbox()
    membership.leave(1.0)
    goodbyes = membership.take_outbox()
    assert {peer for peer, _ in goodbyes} == {"a", "b"}
    for _, message in goodbyes:
        assert isinstance(message, Delta)
        assert message.news.claims == (left("me"),)
    assert membership.members["me"].state == "left"
    assert membership.next_wakeup == float("inf")
    membership.receive(2.0, "a", Ping(seq=1, news=News()))
    tell(membership, left("me"), now=2.0)
    membership.tick(3.0)
    assert not membership.take_outbox()
    assert membership.record.incarnation == 1


def test_the_accused_hears_of_it_at_once() -> None:
    membership = member(record("a"), gossip_interval=100.0)
    membership.disconnected(0.0, "a")
    membership.take_outbox()
    membership.tick(CONFIG.lost_timeout)
    told = [(peer, m.news.claims) for peer, m in sent(membership, Delta) if isinstance(m, Delta)]
    assert ("a", (Claim("a", "suspect", 1, "me"),)) in told


def test_after_a_freeze_of_its_own_a_node_gives_suspects_time_to_answer() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    membership.tick(500.0)
    assert membership.members["a"].state == "suspect"
    membership.receive(500.1, "a", news(record("a", 2)))
    assert membership.members["a"].state == "alive"


def test_messages_that_come_first_after_a_freeze_do_not_hide_it() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    membership.receive(500.0, "b", Ping(seq=1, news=News()))
    membership.tick(500.0)
    assert membership.members["a"].state == "suspect"


def test_a_suspect_that_stays_silent_is_dead_in_the_end() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    while membership.next_wakeup <= 4.0:
        membership.tick(membership.next_wakeup)
    assert membership.members["a"].state == "dead"


def digests_to(membership: Membership, peer: str) -> int:
    return sum(receiver == peer for receiver, _ in sent(membership, Digest))


def test_a_new_connection_synchronises_unless_gossip_has_kept_both_in_touch() -> None:
    membership = member(record("a"), record("b"))
    membership.connected("a")
    assert digests_to(membership, "a") == 1
    membership.receive(0.0, "a", Delta(news=News()))
    assert not membership.synced
    membership.receive(0.0, "a", Delta(news=News(), answer=True))
    assert membership.synced
    membership.connected("b")
    assert digests_to(membership, "b") == 0
    membership.connected("stranger")
    assert digests_to(membership, "stranger") == 1
    membership.disconnected(0.1, "b")
    membership.connected("b")
    assert [receiver for receiver, _ in sent(membership, Summary)] == ["b"]


def test_a_connected_stranger_is_asked_again_until_it_answers() -> None:
    membership = member()
    membership.connected("stranger")
    membership.take_outbox()
    membership.tick(1.0)
    assert digests_to(membership, "stranger") == 1
    membership.receive(1.5, "stranger", news(record("stranger")))
    membership.tick(2.0)
    assert digests_to(membership, "stranger") == 0


def test_now_and_then_everything_is_compared_with_somebody() -> None:
    membership = member(record("a"))
    compared = 0
    while membership.next_wakeup <= 10 * CONFIG.sync_interval:
        now = membership.next_wakeup
        membership.tick(now)
        for peer, message in membership.take_outbox():
            if isinstance(message, Ping):
                membership.receive(now, peer, Ack(seq=message.seq, news=News()))
            compared += isinstance(message, Digest)
    assert 9 <= compared <= 11


def test_the_dead_are_tried_again_even_when_they_have_been_dropped() -> None:
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    tried: list[float] = []
    while membership.next_wakeup <= 200.0:
        now = membership.next_wakeup
        membership.tick(now)
        tried += [now for peer, m in membership.take_outbox() if isinstance(m, Digest)]
    assert "a" not in membership.members
    assert max(tried) > 190


def test_large_views_travel_in_bounded_messages() -> None:
    stages = tuple(
        StageReport(
            model="m" * 400, pipeline=f"p{i}", start=0, end=9, state="failed", reason="x" * 900
        )
        for i in range(10)
    )
    names = [f"{i:05}{'x' * 120}" for i in range(500)]
    table = table_of(record("me"))
    for name in names:
        known = record(name, stages=stages)
        table.learn(0.0, known, signed(known))
        table.suspect(0.0, name, 1)
    empty = table_of(record("other"))
    parts = digests(table)
    wants: list[str] = []
    for part in parts:
        assert len(msgspec.msgpack.encode(part)) <= MAX_MESSAGE
        wants += compare(empty, "me", part).wants
    assert sorted(wants) == sorted(["me", *names])
    (digest,) = digests(empty)
    difference = compare(table, "other", digest)
    answers = list(deltas(difference.records, difference.claims, wants))
    assert all(len(msgspec.msgpack.encode(answer)) <= MAX_MESSAGE for answer in answers)
    assert {r.node for answer in answers for r in answer.news.records} == {"me", *names}
    assert {c.node for answer in answers for c in answer.news.claims} == set(names)
    assert [node for answer in answers for node in answer.wants] == wants


lives = st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.integers(0, 3))


@given(st.lists(lives, max_size=12), st.randoms(use_true_random=False))
def test_tables_that_heard_the_same_records_agree(
    heard: list[tuple[str, int, int]], shuffler: object
) -> None:
    def after(order: list[tuple[str, int, int]]) -> dict[str, tuple[NodeRecord, str, int]]:
        table = table_of(record("me"))
        for node, incarnation, version in order:
            known = record(node, incarnation, version)
            table.learn(0.0, known, signed(known))
        return {n: (m.record, m.state, m.incarnation) for n, m in table.members.items()}

    shuffled = list(heard)
    shuffler.shuffle(shuffled)  # type: ignore[attr-defined]
    assert after(heard) == after(shuffled)


@given(
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 3), st.integers(0, 2))),
    st.lists(st.tuples(st.sampled_from("abcdefg"), st.integers(1, 3), st.integers(0, 2))),
)
def test_one_exchange_of_digests_makes_two_views_equal(
    mine: list[tuple[str, int, int]], theirs: list[tuple[str, int, int]]
) -> None:
    one, other = membership_of(record("x")), membership_of(record("y"))
    for membership, heard in ((one, mine), (other, theirs)):
        membership.receive(0.0, "teller", news(*(record(*life) for life in heard)))
        membership.take_outbox()
    one.join("y")
    for _ in range(4):
        for source, target in ((one, other), (other, one)):
            for peer, message in source.take_outbox():
                if peer == target.id:
                    target.receive(0.0, source.id, message)
    assert {n: m.record for n, m in one.members.items()} == {
        n: m.record for n, m in other.members.items()
    }
    assert one.synced


def test_a_change_after_a_quiet_time_is_no_freeze() -> None:
    """The tick that a change calls for comes as late as the change, and excuses nobody."""
    membership = member(record("a"))
    tell(membership, Claim("a", "suspect", 1, "b"))
    for step in range(1, 15):
        now = step * 0.3
        while membership.next_wakeup <= now - 0.001:
            membership.tick(membership.next_wakeup)
        membership.update(memory=step)
        membership.tick(now)
    assert membership.members["a"].state == "dead"
