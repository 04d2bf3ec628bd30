import msgspec
import pytest

from pxd.cluster.adoption import is_credible, later_source, may_push
from pxd.cluster.members import Member
from pxd.cluster.messages import LAST_COUNT, MemberState
from pxd.cluster.plans import Epoch, Plan
from pxd.cluster.records import NodeRecord


def member(node: str, plan: Epoch | None, state: MemberState = "alive") -> Member:
    return Member(NodeRecord(id=node, name=node, plan=plan), state, 0.0, 1)


def cluster(**plans: Epoch | None) -> dict[str, Member]:
    return {node: member(node, plan) for node, plan in plans.items()}


def test_only_a_member_may_push_and_only_its_own_plan() -> None:
    members = cluster(a=None, b=None)
    plan = Plan(Epoch(1, "a", 1), ())
    assert may_push("a", plan, members)
    assert not may_push("b", plan, members)
    assert not may_push("c", Plan(Epoch(1, "c", 1), ()), members)


def test_the_latest_plan_is_pulled_and_nothing_that_is_no_later() -> None:
    old, new = Epoch(1, "a", 1), Epoch(2, "b", 1)
    members = cluster(a=old, b=new, c=None)
    assert later_source(None, members, "") == "b"
    assert later_source(old, members, "") == "b"
    assert later_source(new, members, "") is None
    assert later_source(None, members, "", refused=new) == "a"


def test_the_unreachable_and_the_gone_are_not_asked_first() -> None:
    epoch = Epoch(1, "a", 1)
    members = cluster(a=epoch, b=epoch)
    assert later_source(None, members, "b") == "a"
    assert later_source(None, members, "a") == "b"
    members["a"] = msgspec.structs.replace(members["a"], state="dead")
    assert later_source(None, members, "b") == "b"
    members["b"] = msgspec.structs.replace(members["b"], state="left")
    assert later_source(None, members, "") is None


MOST = 1 << 40


@pytest.mark.parametrize(
    ("epoch", "leads", "credible"),
    [
        (Epoch(7, "a", 1), 0, True),
        (Epoch(MOST, "a", 1), 0, True),
        (Epoch(MOST + 1, "a", 1), 0, False),
        (Epoch(LAST_COUNT, "a", 1), 0, False),
        (Epoch(7, "me", LAST_COUNT), 0, True),
        (Epoch(7, "me", 1), 7, False),
        (Epoch(8, "me", 1), 7, False),
        (Epoch(6, "me", 1), 7, True),
        (Epoch(7, "a", 1), 7, True),
    ],
)
def test_what_plans_there_can_be(epoch: Epoch, leads: int, credible: bool) -> None:
    def check(epoch: Epoch) -> bool:
        return is_credible(epoch, "me", leads, MOST)

    assert check(epoch) is credible
    assert (later_source(None, cluster(z=epoch), "", None, check) == "z") is credible
