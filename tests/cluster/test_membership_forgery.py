"""What a member gone bad can say of others, and that none of it counts."""

import hashlib

import msgspec
import pytest

from pxd.cluster.admission import Refusal
from pxd.cluster.membership import Membership
from pxd.cluster.messages import (
    LAST_COUNT,
    Claim,
    Delta,
    Digest,
    DigestEntry,
    News,
    SignedRecord,
)
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import seal
from tests.cluster.single import (
    CONFIG,
    kinds,
    left,
    member,
    membership_of,
    news,
    record,
    run,
    sent,
    tell,
)
from tests.signers import FakeSigner, signed


class LaterRecord(NodeRecord, frozen=True, kw_only=True):
    """A record of a later version of pxd."""

    invented_later: tuple[str, ...]


def forge(content: NodeRecord, by: str) -> SignedRecord:
    return seal(content, FakeSigner(by))


def hear(membership: Membership, *records: SignedRecord, by: str = "bad") -> None:
    membership.receive(1.0, by, Delta(news=News(records=records)))


def test_nobody_else_can_sign_a_record() -> None:
    membership = member(record("a", memory=1))
    for forged in (
        forge(record("a", 1, 1, memory=666), by="bad"),
        forge(record("a", 9, 0, memory=666), by="bad"),
        msgspec.structs.replace(signed(record("a", memory=1)), version=5),
        msgspec.structs.replace(signed(record("a", memory=1)), incarnation=5),
        msgspec.structs.replace(
            signed(record("a", 1, 1)), content=msgspec.msgpack.encode(record("a", 1, 1, memory=666))
        ),
    ):
        hear(membership, forged)
    assert membership.members["a"].record == record("a", memory=1)
    assert kinds(membership) == []
    assert membership.refused["forged"] == 5
    assert membership.take_refusals() == [Refusal("forged", "bad", "a")]
    assert not run(membership, 0.5), "nothing of it is passed on"


def test_a_stranger_cannot_be_made_up() -> None:
    membership = member()
    hear(membership, forge(record("ghost"), by="bad"))
    assert set(membership.members) == {"me"}
    assert membership.refused["forged"] == 1


def test_a_record_cannot_go_by_another_name() -> None:
    """`bad` signs a record of `a` in its own name."""
    membership = member(record("a", memory=1))
    content = msgspec.msgpack.encode(record("a", 7, memory=666))
    own = signed(record("bad", 7))
    relabelled = seal(record("bad", 7), Relabelling("bad", content))
    hear(membership, msgspec.structs.replace(relabelled, content=content), own)
    assert membership.members["a"].record.memory == 1
    assert membership.members["bad"].record == record("bad", 7)


class Relabelling(FakeSigner):
    """Signs the statement for other content than it was asked for."""

    def __init__(self, node: str, content: bytes) -> None:
        super().__init__(node)
        self._content = content

    def sign(self, statement: bytes) -> bytes:
        return super().sign(statement[:-32] + hashlib.sha256(self._content).digest())


def test_an_old_record_does_not_come_back() -> None:
    membership = member(record("a", 2, 5, memory=1))
    hear(membership, signed(record("a", 2, 4, memory=2)), signed(record("a", 1, 9, memory=3)))
    assert membership.members["a"].record == record("a", 2, 5, memory=1)
    tell(membership, left("a", 2))
    hear(membership, signed(record("a", 2, 5, memory=1)), signed(record("a", 2, 6)))
    assert membership.members["a"].state == "left"


def test_signed_nonsense_is_refused() -> None:
    membership = member()
    content = b"\x93nonsense"
    nonsense = seal(record("bad"), Relabelling("bad", content))
    hear(membership, msgspec.structs.replace(nonsense, content=content))
    assert set(membership.members) == {"me"}
    assert membership.refused["forged"] == 1


def test_records_of_later_versions_are_passed_on_as_they_were_signed() -> None:
    membership = member(record("b"))
    envelope = signed(
        LaterRecord(id="a", name="a", incarnation=1, memory=7, invented_later=("x", "y"))
    )
    hear(membership, envelope, by="a")
    assert membership.members["a"].record.memory == 7
    passed_on = [
        told
        for _, _, message in run(membership, 2.0)
        if isinstance(message, Delta)
        for told in message.news.records
        if told.node == "a"
    ]
    assert passed_on == [envelope]
    membership.receive(2.0, "b", Digest(after=None, until=None, entries=()))
    answers = [m for peer, m in membership.take_outbox() if peer == "b" and isinstance(m, Delta)]
    assert envelope in [told for answer in answers for told in answer.news.records]


@pytest.mark.parametrize(
    "claim",
    [
        Claim("a", "left", 1, "a"),
        Claim("a", "left", 1, "a", b"x" * 64),
        Claim("a", "left", 1, "a", left("bad").proof),
        Claim("a", "left", 2, "a", left("a", 1).proof),
        Claim("a", "left", 1, "a", signed(record("a")).signature),
    ],
    ids=["unsigned", "nonsense", "somebody else's", "of another life", "of something else"],
)
def test_nobody_else_can_say_goodbye(claim: Claim) -> None:
    membership = member(record("a"))
    tell(membership, claim, by="bad")
    entry = DigestEntry("a", (1, 0), "left", claim.incarnation, claim.proof)
    membership.receive(1.0, "bad", Digest(after=None, until=None, entries=(entry,)))
    assert membership.members["a"].state == "alive"
    assert not [
        told
        for _, _, message in run(membership, 2.0)
        if isinstance(message, Delta)
        for told in message.news.claims
        if told.state == "left"
    ]


def test_a_goodbye_is_passed_on_with_its_proof() -> None:
    membership = member(record("a"), record("b"))
    tell(membership, left("a"))
    gossip = [
        told
        for _, peer, message in run(membership, 2.0)
        if isinstance(message, Delta) and peer == "b"
        for told in message.news.claims
        if told.state == "left"
    ]
    assert gossip == [left("a")]
    entry = DigestEntry("a", (1, 0), "alive", 1)
    membership.receive(2.0, "b", Digest(after=None, until=None, entries=(entry,)))
    answers = [m for _, m in sent(membership, Delta) if isinstance(m, Delta)]
    assert left("a", by="me") in [told for answer in answers for told in answer.news.claims]
    membership.join("b")
    ((_, digest),) = sent(membership, Digest)
    other = member(record("a"), record("b"), node="b")
    other.receive(2.0, "me", digest)
    assert other.members["a"].state == "left"


def test_claims_about_lives_nobody_has_shown_are_void() -> None:
    membership = member(record("a", 3))
    for incarnation in (4, LAST_COUNT):
        tell(membership, Claim("a", "suspect", incarnation, "bad"), by="bad")
        tell(membership, Claim("a", "dead", incarnation, "bad"), by="bad")
    assert membership.members["a"].state == "alive"
    assert kinds(membership) == []


def test_whoever_claims_something_about_an_unknown_life_is_asked_for_it_once() -> None:
    membership = member(record("a", 3))
    claim = Claim("a", "suspect", 4, "b")
    for _ in range(3):
        tell(membership, claim)
    ((peer, question),) = sent(membership, Delta)
    assert peer == "teller"
    assert isinstance(question, Delta)
    assert question.wants == ("a",)
    membership.receive(0.1, "teller", Delta(news=News((signed(record("a", 4)),), (claim,))))
    assert membership.members["a"].state == "suspect"


@pytest.mark.parametrize("state", ["suspect", "dead", "left"])
@pytest.mark.parametrize("incarnation", [2, LAST_COUNT])
def test_a_node_does_not_outbid_claims_about_lives_it_never_had(
    state: str, incarnation: int
) -> None:
    membership = member(record("a"))
    tell(membership, Claim("me", state, incarnation, "bad"), by="bad")  # type: ignore[arg-type]
    tell(membership, Claim("me", state, incarnation, "bad", b"x" * 104), by="bad")  # type: ignore[arg-type]
    hear(membership, forge(record("me", incarnation), by="bad"))
    entry = DigestEntry("me", (incarnation, 7), "dead", incarnation)
    membership.receive(0.1, "bad", Digest(after=None, until=None, entries=(entry,)))
    run(membership, 3.0)
    assert membership.record == record("me")
    tell(membership, Claim("me", "suspect", 1, "a"), now=3.0)
    assert membership.record.incarnation == 2, "doubts about this life are another matter"


def test_at_the_end_of_all_numbers_nothing_breaks() -> None:
    membership = membership_of(record("me", LAST_COUNT))
    tell(membership, Claim("me", "suspect", LAST_COUNT, "a"))
    assert membership.record.order == (LAST_COUNT, 1)
    last = membership_of(record("me", LAST_COUNT, LAST_COUNT))
    tell(last, Claim("me", "suspect", LAST_COUNT, "a"))
    last.update(memory=7)
    assert last.record.order == (LAST_COUNT, LAST_COUNT)
    assert run(last, 5.0) == [], "there is nobody to talk to, and nothing to be done"


def test_a_node_that_lost_its_counters_returns_though_it_has_been_dropped() -> None:
    """All that others keep of it is that it died, and the proof that it lived that long."""
    others = member(record("a", 10, 3))
    tell(others, Claim("a", "suspect", 10, "b"))
    run(others, CONFIG.drop_after + 10)
    assert "a" not in others.members
    returned = membership_of(record("a", 2))
    returned.join("me")
    talk(returned, others, now=80.0)
    assert returned.record.incarnation == 11
    returned.join("me")
    talk(returned, others, now=81.0)
    assert others.members["a"].state == "alive"


def talk(one: Membership, other: Membership, now: float) -> None:
    for _ in range(4):
        for source, target in ((one, other), (other, one)):
            for peer, message in source.take_outbox():
                if peer == target.id:
                    target.receive(now, source.id, message)


def test_slander_costs_the_cluster_no_more_than_a_record_per_second() -> None:
    membership = member(record("a"))
    for step in range(1000):
        now = step / 100
        tell(membership, Claim("me", "suspect", membership.record.incarnation, "bad"), now=now)
        while membership.next_wakeup <= now:
            membership.tick(membership.next_wakeup)
    assert 10 <= membership.record.incarnation <= 14
    run(membership, 12.0)
    before = membership.record.incarnation
    run(membership, 20.0)
    assert membership.record.incarnation == before


def test_honest_news_counts_whoever_passes_it_on() -> None:
    membership = member(record("a"))
    membership.receive(1.0, "bad", news(record("a", 1, 1, memory=4)))
    assert membership.members["a"].record.memory == 4
