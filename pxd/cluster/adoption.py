"""Whose plan to take, and from whom: the decisions by which every node ends up with the latest."""

from collections.abc import Callable, Mapping
from typing import Protocol

from pxd.cluster.plans import Epoch, Plan
from pxd.cluster.records import NodeRecord


class MemberLike(Protocol):
    @property
    def record(self) -> NodeRecord: ...
    @property
    def state(self) -> str: ...


Members = Mapping[str, MemberLike]


def is_credible(epoch: Epoch, own_id: str, leads: int, most: int) -> bool:
    """Whether a plan of that epoch may come from others. This node leads the term `leads`, or 0.

    One of a term above `most`, for which see `pxd.cluster.stamps`, could never be replaced; while
    this node leads, it alone writes plans in its name.
    """
    made_up = epoch.leader == own_id and 0 < leads <= epoch.term
    return epoch.term <= most and not made_up


def may_push(peer: str, plan: Plan, members: Members) -> bool:
    """Whether `plan` counts when `peer` offers it unasked: only its author may, and as a member."""
    return plan.epoch.leader == peer and peer in members


def later_source(
    held: Epoch | None,
    members: Members,
    unreachable: str,
    refused: Epoch | None = None,
    credible: Callable[[Epoch], bool] = lambda _: True,
) -> str | None:
    """The member to pull a plan from: of those that are there the one with the latest.

    None when nobody's record shows a later plan than `held`. Of several that hold the same one,
    `unreachable`, which did not answer the last time, is the last resort. `refused` is a plan that
    was looked at and makes no sense, and only `credible` ones are looked for.
    """
    later = [
        (plan, peer != unreachable, peer)
        for peer, member in members.items()
        if member.state in ("alive", "suspect")
        and (plan := member.record.plan) is not None
        and plan != refused
        and credible(plan)
        and (held is None or plan > held)
    ]
    return max(later)[2] if later else None
