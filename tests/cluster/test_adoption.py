import msgspec

from pxd.cluster.adoption import later_source, may_push
from pxd.cluster.members import Member
from pxd.cluster.messages import MemberState
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
