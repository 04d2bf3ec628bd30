"""What a member can cost the others: everything that it can make grow has an end."""

import msgspec
import pytest

from pxd.cluster.allowance import Allowance
from pxd.cluster.messages import (
    MAX_MESSAGE,
    MAX_RECORD,
    Claim,
    Delta,
    Digest,
    DigestEntry,
    GossipMessage,
    News,
    Ping,
    PingRequest,
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
    run,
    run_answered,
    sent,
    tell,
)
from tests.signers import signed


def large(node: str, version: int = 0, reason: int = 1750, stages: int = 15) -> NodeRecord:
    report = StageReport(
        model="m", pipeline="p", start=0, end=1, state="failed", reason="x" * reason
    )
    return record(node, 1, version, stages=(report,) * stages)


def records_in(messages: list[GossipMessage], node: str) -> set[int]:
    """Versions of a node's record that are told."""
    return {
        told.version
        for message in messages
        if not isinstance(message, Digest)
        for told in message.news.records
        if told.node == node
    }


def test_an_allowance_is_a_burst_and_a_rate() -> None:
    allowance = Allowance(2.0, 3.0)
    assert [allowance.take(100.0) for _ in range(4)] == [True, True, True, False]
    assert allowance.ready_at() == pytest.approx(100.5)
    assert not allowance.take(100.4)
    assert allowance.take(allowance.ready_at())
    assert not allowance.take(101.0, reserve=1.0)
    assert allowance.take(101.0)
    assert allowance.take_up_to(200.0, 9) == 3
    assert not allowance.has(199.0), "time does not run backwards here"


def test_unknown_nodes_beyond_the_bound_are_refused() -> None:
    membership = member(*(record(f"n{index}") for index in range(9)), max_members=10)
    membership.receive(1.0, "bad", news(*(record(f"x{index}") for index in range(500))))
    assert len(membership.members) == 10
    assert membership.refused["full"] == 500
    assert [refusal.reason for refusal in membership.take_refusals()] == ["full"]
    membership.receive(1.0, "n0", news(record("n0", 1, 1, memory=7)))
    assert membership.members["n0"].record.memory == 7, "those that are in are heard"
    entries = tuple(DigestEntry(f"x{index}", (1, 0), "alive", 1) for index in range(500))
    membership.take_outbox()
    membership.receive(1.0, "bad", Digest(after=None, until=None, entries=entries))
    assert not any(m.wants for _, m in sent(membership, Delta) if isinstance(m, Delta))


def test_the_gone_make_way_for_new_nodes() -> None:
    membership = member(*(record(f"n{index}") for index in range(9)), max_members=10)
    tell(membership, left("n3"))
    membership.receive(1.0, "new", news(record("new"), record("other")))
    assert "new" in membership.members
    assert not {"n3", "other"} & set(membership.members)
    assert kinds(membership) == [("left", "n3"), ("dropped", "n3"), ("joined", "new")]


def test_all_records_together_have_a_budget_and_everybody_a_share_of_it() -> None:
    membership = member(record("honest"), max_members=20, record_budget=100_000)
    membership.receive(1.0, "bad", news(*(large(f"x{index}") for index in range(10))))
    known = set(membership.members) - {"me", "honest"}
    assert 2 <= len(known) <= 3
    for node in known:
        membership.receive(2.0, "bad", news(large(node, 1)))
        assert membership.members[node].record.version == 1, "no larger than before"
    membership.receive(2.0, "honest", news(large("honest", 1, 800, 2), record("new")))
    assert membership.members["honest"].record.version == 1
    assert "new" in membership.members
    held = sum(len(envelope.content) for envelope in membership._table.signed.values())
    assert held == membership._table._bytes


def test_the_bytes_are_counted_when_nodes_go() -> None:
    membership = member(large("a"), record("b"))
    tell(membership, left("a"))
    run(membership, CONFIG.drop_after + 20)
    held = sum(len(envelope.content) for envelope in membership._table.signed.values())
    assert held == membership._table._bytes < 2000


def test_versions_of_a_record_are_taken_at_a_bounded_rate_and_the_last_one_in_the_end() -> None:
    """A member changes its record as fast as it can; others hear of few of these changes."""
    membership = member(record("bad"), record("a"))
    said: list[GossipMessage] = []
    taken = 0
    for version in range(1, 2001):
        now = 1.0 + version / 200
        membership.receive(now, "bad", news(large("bad", version)))
        taken += membership.members["bad"].record.version == version
        membership.receive(now, "a", Ping(seq=version, news=News()))
        while membership.next_wakeup <= now:
            membership.tick(membership.next_wakeup)
        said += [message for _, message in membership.take_outbox()]
    bound = 2 * CONFIG.record_burst + 2 * CONFIG.record_rate * 10 + 1
    assert 20 < taken <= bound
    assert len(records_in(said, "bad")) <= bound
    assert membership.refused["flood"] == 2000 - taken
    membership.receive(20.0, "teller", news(large("bad", 2000)))
    assert membership.members["bad"].record.version == 2000


def test_a_flood_of_forgeries_is_not_even_looked_at() -> None:
    checked = 0

    membership = member(record("a"), verify_rate=10.0, verify_burst=64.0)
    signer = membership._beliefs.admission._signer
    verify = signer.verify

    def count(node: str, statement: bytes, signature: bytes) -> bool:
        nonlocal checked
        checked += 1
        return verify(node, statement, signature)

    signer.verify = count  # type: ignore[method-assign]
    forged = msgspec.structs.replace(signed(record("a", 1, 9)), signature=b"x" * 64)
    for step in range(100):
        membership.receive(step / 100, "bad", Delta(news=News(records=(forged,) * 100)))
    assert 1 <= checked <= 64 / 33 + 10 + 1
    membership.receive(1.0, "a", news(record("a", 1, 1)))
    assert membership.members["a"].record.version == 1, "which costs nobody else anything"


def test_own_changes_are_told_at_a_bounded_rate_and_the_last_one_in_the_end() -> None:
    membership = member(record("a"))
    told: set[int] = set()
    for step in range(2000):
        membership.update(memory=step)
        said = run_answered(membership, step / 200)
        told |= records_in([message for _, _, message in said], "me")
    assert 20 <= len(told) <= CONFIG.record_burst + CONFIG.record_rate * 10 + 1
    later = run_answered(membership, 12.0)
    assert membership.record.version in records_in([m for _, _, m in later], "me")


def test_load_does_not_keep_important_changes_waiting() -> None:
    membership = member(record("a"))
    for step in range(100):
        membership.update(running=step)
        run_answered(membership, step / 10)
    membership.update(leads=1)
    said = [message for _, _, message in run_answered(membership, 10.01)]
    assert membership.record.version in records_in(said, "me")


def test_load_is_told_less_often_the_more_members_there_are() -> None:
    def versions_told(members: int) -> int:
        membership = member(*(record(f"n{index:03}") for index in range(members)))
        told: set[int] = set()
        for step in range(600):
            membership.update(running=step)
            said = run_answered(membership, step / 10)
            told |= records_in([message for _, _, message in said], "me")
        return len(told)

    assert versions_told(20) > 100
    assert versions_told(600) < 15


def test_a_digest_is_answered_only_so_often() -> None:
    """Few bytes ask for the whole table."""
    others = tuple(record(f"n{index:03}") for index in range(300))
    membership = member(*others, answer_burst=1000.0, answer_rate=10.0)
    answered = 0
    for step in range(100):
        membership.receive(step / 100, "bad", Digest(after=None, until=None, entries=()))
        wants = Delta(news=News(), wants=tuple(r.id for r in others))
        membership.receive(step / 100, "bad", wants)
        for _, message in membership.take_outbox():
            assert not isinstance(message, Delta) or len(msgspec.msgpack.encode(message)) <= (
                MAX_MESSAGE
            )
            answered += len(message.news.records) if isinstance(message, Delta) else 0
    assert answered <= 1000 + 10 + len(others)
    membership.receive(1.0, "good", Digest(after=None, until=None, entries=()))
    records = [
        r for _, m in sent(membership, Delta) if isinstance(m, Delta) for r in m.news.records
    ]
    assert len(records) >= 300


def test_questions_of_strangers_are_not_answered_with_digests_without_end() -> None:
    membership = member(record("a"))
    for seq in range(100):
        membership.receive(0.1, "stranger", Ping(seq=seq, news=News()))
    assert len(sent(membership, Digest)) == 1


def test_corrections_fit_one_message_each_way() -> None:
    names = [f"n{index:03}" for index in range(400)]
    membership = member(*(record(name, 2) for name in names), max_members=1000)
    tell(membership, *(left(name, 2) for name in names[:200]))
    run(membership, CONFIG.drop_after + 70)
    old = tuple(signed(record(name, 2)) for name in names[:200])
    future = tuple(Claim(name, "suspect", 3, "bad") for name in names[200:])
    membership.take_outbox()
    membership.receive(200.0, "bad", Delta(news=News(records=old, claims=future)))
    answers = sent(membership, Delta)
    assert len(answers) <= 2
    assert all(len(msgspec.msgpack.encode(answer)) <= MAX_MESSAGE for _, answer in answers)


def test_ping_requests_of_one_peer_do_not_use_up_all_relays() -> None:
    membership = member(record("target"))
    for seq in range(1000):
        membership.receive(0.1, "bad", PingRequest(seq=seq, target="target", news=News()))
    assert len(sent(membership, Ping)) < 100
    membership.receive(0.1, "good", PingRequest(seq=1, target="target", news=News()))
    assert len(sent(membership, Ping)) == 1
    run(membership, 3.0)
    assert not membership._prober._relays
    assert not membership._prober._relayed_for
    assert not membership._prober._nacks


def test_what_is_kept_about_peers_has_an_end() -> None:
    membership = member(record("a"))
    for index in range(6000):
        membership.connected(f"peer{index}")
        membership.receive(0.1, f"peer{index}", news(record("b", index + 1)))
        membership.disconnected(0.1, f"peer{index}")
        membership.take_outbox()
    for _ in range(100):
        membership.connected("a")
        membership.disconnected(0.2, "a")
    membership.take_outbox()
    assert len(membership._asked) <= 4096
    assert len(membership._parted) == 1
    assert len(membership._beliefs.admission._peers) <= 1024
    assert len(membership._beliefs.admission._told) <= 1025
    assert len(membership._prober._probes) <= 2


def test_members_that_come_and_go_do_not_lengthen_the_round() -> None:
    membership = member(record("a"), drop_after=0.1)
    for life in range(1, 3000):
        membership.receive(life / 1000, "bad", news(record("bad", life)))
        tell(membership, left("bad", life), now=life / 1000)
        membership.tick(life / 1000)
        membership.take_outbox()
        membership.take_events()
    assert len(membership._prober._order) < 3000
    run(membership, 10.0)
    assert len(membership._prober._order) < 200


def test_tombstones_have_an_end() -> None:
    membership = member(max_tombstones=50, drop_after=1.0)
    for index in range(200):
        now = index / 10
        membership.receive(now, "bad", news(record(f"x{index}")))
        tell(membership, left(f"x{index}"), now=now)
        membership.tick(now)
        membership.take_outbox()
    run(membership, 30.0)
    assert len(membership._table.tombstones) == 50
    assert "x199" in membership._table.tombstones


def test_a_record_that_is_too_large_is_cut_short_for_others() -> None:
    own = large("me", reason=2000, stages=64)
    assert len(msgspec.msgpack.encode(own)) > MAX_RECORD
    membership = membership_of(own)
    assert membership.record == own
    seen = member(node="other")
    seen.receive(0.0, "me", Delta(news=News(records=(membership._table.signed["me"],))))
    record_seen = seen.members["me"].record
    assert len(record_seen.stages) == 64
    assert all(len(stage.reason) == 100 for stage in record_seen.stages)
    wide = StageReport(model="m" * 512, pipeline="p" * 128, start=0, end=1, state="ready")
    membership.update(stages=(wide,) * 64)
    assert len(membership._table.signed["me"].content) <= MAX_RECORD
    seen.receive(0.0, "me", Delta(news=News(records=(membership._table.signed["me"],))))
    assert 16 <= len(seen.members["me"].record.stages) < 64


def test_every_message_fits_whatever_the_records() -> None:
    membership = member(*(large(f"n{index}") for index in range(20)))
    membership.join("n1")
    sizes = [len(msgspec.msgpack.encode(message)) for _, _, message in run(membership, 5.0)]
    assert MAX_RECORD - 1024 < max(sizes) <= MAX_MESSAGE
