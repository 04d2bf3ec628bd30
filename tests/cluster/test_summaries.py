"""Synchronisation that costs little where nothing differs, and rumours that are worth none."""

import msgspec
import pytest

from pxd.cluster.anti_entropy import differing, summary
from pxd.cluster.members import MemberTable
from pxd.cluster.membership import Membership
from pxd.cluster.messages import MAX_MESSAGE, Claim, Delta, Digest, News, Part, Summary
from pxd.cluster.plans import Epoch
from tests.cluster.single import (
    CONFIG,
    member,
    membership_of,
    news,
    record,
    run_answered,
    sent,
    table_of,
    tell,
)
from tests.signers import signed

CROWD = [record(f"n{i:03}") for i in range(100)]


def filled(own: str, skip: str = "") -> MemberTable:
    table = table_of(record(own))
    for other in CROWD:
        if other.id not in (own, skip):
            table.learn(0.0, other, signed(other))
    return table


def exchange(one: Membership, other: Membership, said: list[Summary]) -> set[type]:
    """Let each hear what the other one says until both are silent; what was said after `said`."""
    kinds: set[type] = set()
    for message in said:
        other.receive(16.0, one.id, message)
    for _ in range(9):
        for here, there in ((other, one), (one, other)):
            for peer, message in here.take_outbox():
                if peer == there.id:
                    kinds.add(type(message))
                    there.receive(16.0, here.id, message)
    return kinds


def test_who_holds_the_same_has_nothing_to_say() -> None:
    assert differing(filled("n000"), summary(filled("n001"))) == []


def test_a_summary_costs_a_few_bytes_per_node() -> None:
    assert len(msgspec.msgpack.encode(summary(filled("n000")))) < 5 * len(CROWD)


@pytest.mark.parametrize("node", ["n000", "n031", "n032", "n077", "n099"])
def test_one_difference_is_found_and_little_else_is_said(node: str) -> None:
    mine, yours = filled("n050"), filled("n051")
    newer = record(node, version=5)
    mine.learn(1.0, newer, signed(newer))
    for here, there in ((mine, yours), (yours, mine)):
        [digest] = differing(here, summary(there))
        assert node in {entry.node for entry in digest.entries}
        assert len(digest.entries) <= 32
        assert len(msgspec.msgpack.encode(digest)) < MAX_MESSAGE


def test_a_node_that_one_side_lacks_makes_a_difference() -> None:
    mine, yours = filled("n050"), filled("n051", skip="n070")
    for here, there in ((mine, yours), (yours, mine)):
        [digest] = differing(here, summary(there))
        assert (digest.after or "") < "n070" <= (digest.until or "o")


def test_who_is_gone_on_both_sides_makes_none_and_on_one_side_does() -> None:
    mine, yours = filled("n050"), filled("n051")
    mine.bury(1.0, "n010", "dead", 1)
    [digest] = differing(mine, summary(yours))
    assert "dead" in {entry.state for entry in digest.entries}
    yours.bury(2.0, "n010", "left", 1)
    assert differing(mine, summary(yours)) == []
    # One side forgets sooner than the other.
    mine.expire(1.0 + CONFIG.drop_after)
    assert "n010" not in mine.members
    assert differing(mine, summary(yours)) == []


@pytest.mark.parametrize(
    "bounds", [["n010"], ["n020", "n010", None], ["n010", "n010", None], [None, None]]
)
def test_a_summary_whose_bounds_make_no_sense_is_not_looked_at(bounds: list[str | None]) -> None:
    made_up = Summary(parts=tuple(Part(bound, bytes(8)) for bound in bounds))
    assert differing(filled("n050"), made_up) == []


def test_two_that_differ_are_one_after_a_summary() -> None:
    one, other = (member(*CROWD, node=node) for node in ("me", "you"))
    for here, there in ((one, other), (other, one)):
        here.receive(0.0, "teller", Delta(news=News((there._table.signed[there.id],))))
        here.synced = True
    changed, lost = record("n003", version=9), record("n090")
    one.receive(0.0, "teller", news(changed))
    one.take_outbox()
    tell(other, Claim(lost.id, "suspect", 1, "teller"))
    run_answered(other, 15.0)
    assert other.members[lost.id].state == "dead"
    other.take_outbox()
    assert Digest in exchange(one, other, [summary(one._table)])
    assert other.members["n003"].record == changed
    assert one.members[lost.id].state == "suspect"


def test_one_that_has_not_heard_all_yet_lets_summaries_pass() -> None:
    newcomer = membership_of(record("new"))
    newcomer.receive(0.0, "n001", summary(filled("n001")))
    assert sent(newcomer, Digest) == []


def test_a_peer_gets_no_more_digests_for_summaries_than_records() -> None:
    membership = member(*CROWD, answer_burst=3, answer_rate=1.0)
    membership.synced = True
    wrong = Summary(parts=(Part("n010", bytes(8)), Part(None, bytes(8))))
    for _ in range(9):
        membership.receive(0.0, "n001", wrong)
    assert len(sent(membership, Digest)) == 3


@pytest.mark.parametrize(("crowd", "told"), [(20, True), (100, False)])
def test_in_a_crowd_an_echo_of_the_leader_is_no_rumour(crowd: int, told: bool) -> None:
    membership = member(*CROWD[:crowd])
    run_answered(membership, 5.0)
    membership.update(term=3)
    membership.update(plan=Epoch(3, "n000", 1))
    assert tells_of(membership, 8.0) == told
    # What matters brings the echo along.
    membership.update(memory=7)
    assert tells_of(membership, 30.0)
    assert membership.record.plan == Epoch(3, "n000", 1)


def test_the_author_of_a_plan_tells_of_it_in_any_crowd() -> None:
    membership = member(*CROWD)
    run_answered(membership, 5.0)
    membership.update(plan=Epoch(3, "me", 1))
    assert tells_of(membership, 8.0)


def test_later_versions_in_answers_are_not_passed_on_and_new_lives_are() -> None:
    membership = member(*CROWD)
    membership.synced = True
    run_answered(membership, 5.0)
    newer = signed(record("n003", version=4))
    membership.receive(5.0, "n001", Delta(news=News((newer,)), answer=True))
    assert not tells_of(membership, 7.0, "n003")
    reborn = signed(record("n003", incarnation=2))
    membership.receive(7.0, "n001", Delta(news=News((reborn,)), answer=True))
    assert tells_of(membership, 9.0, "n003")


def test_a_newcomer_to_a_crowd_tells_nobody_who_is_in_it() -> None:
    newcomer = membership_of(record("new"))
    newcomer.connected("n000")
    everybody = tuple(signed(each) for each in CROWD)
    newcomer.receive(0.1, "n000", Delta(news=News(everybody), answer=True))
    assert len(newcomer.members) == 1 + len(CROWD)
    told = {
        signed_record.node
        for _, _, message in run_answered(newcomer, 5.0)
        if isinstance(message, Delta)
        for signed_record in message.news.records
    }
    assert len(told) <= CONFIG.flat_members + 1


def test_a_newcomer_asks_a_few_of_those_it_meets_at_once() -> None:
    newcomer = membership_of(record("new"))
    for other in CROWD:
        newcomer.connected(other.id)
    assert len({peer for peer, _ in sent(newcomer, Digest)}) == CONFIG.gossip_fanout


def tells_of(membership: Membership, until: float, node: str = "me") -> bool:
    return any(
        node in {signed_record.node for signed_record in message.news.records}
        for _, _, message in run_answered(membership, until)
        if isinstance(message, Delta)
    )
