"""The member table: how records and claims about a node merge into what this node holds true.

Content is ordered by (incarnation, version), liveness by incarnation: a claim holds until the node
shows a greater incarnation, and only the node itself can do that. So tables that have heard the
same agree, in whatever order they heard it.
"""

import math
from typing import Literal

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.messages import Claim, MemberState
from pxd.cluster.records import NodeRecord

EventKind = Literal[
    "joined", "updated", "suspected", "recovered", "died", "left", "dropped", "refuted"
]

_RTT_GAIN = 0.2
_RANK: dict[MemberState, int] = {"alive": 0, "suspect": 1, "dead": 2, "left": 3}


class MemberEvent(msgspec.Struct, frozen=True):
    """What happened to the node of `record`, which is the latest one held.

    `refuted` concerns this node itself: its incarnation grew and must be persisted. Every `joined`
    is followed by one `died` or `left` before the next, and by `dropped` if the node stays away.
    Of this node itself only `updated`, `refuted` and `left` are told.
    """

    kind: EventKind
    record: NodeRecord


class Member(msgspec.Struct, frozen=True):
    """A node as this one sees it. `since` is the time of the last change of `state`.

    `incarnation` is the life that `state` is about: the record's, or a greater one heard of. `rtt`
    in seconds, smoothed; None until measured.
    """

    record: NodeRecord
    state: MemberState
    since: float
    incarnation: int
    rtt: float | None = None

    @property
    def live(self) -> bool:
        """Not known to be gone: a suspect still counts."""
        return self.state in ("alive", "suspect")

    @property
    def standing(self) -> tuple[int, int]:
        """Order of liveness: of two views the greater one is the later."""
        return self.incarnation, _RANK[self.state]


def standing(state: MemberState, incarnation: int) -> tuple[int, int]:
    """`Member.standing` of a view that somebody else holds."""
    return incarnation, _RANK[state]


class Tombstone(msgspec.Struct, frozen=True):
    """Remembers a dropped node, so that late gossip of its past life does not bring it back."""

    state: Literal["dead", "left"]
    incarnation: int
    until: float


class MemberTable:
    """All members, this node included, and what has happened to them since `take_events`."""

    def __init__(self, own: NodeRecord, config: MembershipConfig) -> None:
        self._config = config
        self._events: list[MemberEvent] = []
        self.own_id = own.id
        self.members = {own.id: Member(own, "alive", 0.0, own.incarnation)}
        self.tombstones: dict[str, Tombstone] = {}
        self._live_others: list[str] = []
        self._drop_times: dict[str, float] = {}

    @property
    def own(self) -> NodeRecord:
        return self.members[self.own_id].record

    def begin(self, now: float) -> None:
        self._set(self.members[self.own_id], since=now)

    def lost(self) -> list[str]:
        """Nodes that went silent without a goodbye, dropped ones included."""
        dead = [id_ for id_, member in self.members.items() if member.state == "dead"]
        return dead + [id_ for id_, stone in self.tombstones.items() if stone.state == "dead"]

    @property
    def live_others(self) -> list[str]:
        """Members not known to be gone, without this node; not to be changed by the caller."""
        return self._live_others

    def replace_own(self, record: NodeRecord, kind: EventKind) -> None:
        self._set(self.members[self.own_id], record=record, incarnation=record.incarnation)
        self._events.append(MemberEvent(kind, record))

    def learn(self, now: float, record: NodeRecord) -> bool:
        """Merge another node's record; says whether it was news."""
        member = self.members.get(record.id)
        if member is None:
            if self.is_buried(record.id, record.incarnation):
                return False
            self.tombstones.pop(record.id, None)
            self._admit(Member(record, "alive", now, record.incarnation))
            return True
        if record.order <= member.record.order:
            return False
        if record.incarnation > member.incarnation:
            self._revive(now, member, record)
        else:
            self._set(member, record=record)
            if member.live:
                self._events.append(MemberEvent("updated", record))
        return True

    def is_buried(self, node: str, incarnation: int) -> bool:
        """Whether a life of a node is known to have ended before the node was dropped."""
        tombstone = self.tombstones.get(node)
        return tombstone is not None and incarnation <= tombstone.incarnation

    def suspect(self, now: float, node: str, incarnation: int) -> None:
        """A live member is in doubt as of `incarnation`, which must not be less than its own."""
        member = self.members[node]
        if member.state == "alive":
            self._events.append(MemberEvent("suspected", member.record))
            self._set(member, state="suspect", since=now, incarnation=incarnation)
        else:
            self._set(member, incarnation=incarnation)

    def bury(self, now: float, node: str, state: Literal["dead", "left"], incarnation: int) -> None:
        member = self.members[node]
        if not member.live:
            # Who died already and is now known to have left first is still gone only once.
            self._set(member, state=state, incarnation=incarnation)
            return
        kind: EventKind = "died" if state == "dead" else "left"
        self._events.append(MemberEvent(kind, member.record))
        self._set(member, state=state, since=now, incarnation=incarnation)
        if node != self.own_id:
            self._live_others = [other for other in self._live_others if other != node]
            self._drop_times[node] = now + self._config.drop_after

    def measure(self, node: str, seconds: float) -> None:
        """Follows a shorter time at once and a longer one slowly: delays only ever add to it."""
        member = self.members[node]
        old = member.rtt if member.rtt is not None else seconds
        self._set(member, rtt=min(seconds, old + _RTT_GAIN * (seconds - old)))

    def claim_about(self, node: str) -> Claim | None:
        """What to tell of a node that is not alive in this view, or no longer in the table."""
        member = self.members.get(node)
        if member is not None:
            if member.state == "alive":
                return None
            return Claim(node, member.state, member.incarnation, self.own_id)
        tombstone = self.tombstones.get(node)
        if tombstone is None:
            return None
        return Claim(node, tombstone.state, tombstone.incarnation, self.own_id)

    def expire(self, now: float) -> list[str]:
        """Drop those gone long enough and forget old tombstones; returns who was dropped."""
        dropped = [node for node, when in self._drop_times.items() if when <= now]
        for node in dropped:
            del self._drop_times[node]
            member = self.members.pop(node)
            state: Literal["dead", "left"] = "left" if member.state == "left" else "dead"
            until = now + self._config.tombstone_for
            self.tombstones[node] = Tombstone(state, member.incarnation, until)
            self._events.append(MemberEvent("dropped", member.record))
        if dropped:
            self._forget_tombstones(now)
        return dropped

    @property
    def next_expiry(self) -> float:
        return min(self._drop_times.values(), default=math.inf)

    def take_events(self) -> list[MemberEvent]:
        events, self._events = self._events, []
        return events

    def _forget_tombstones(self, now: float) -> None:
        excess = len(self.tombstones) - self._config.max_tombstones
        for index, (node, tombstone) in enumerate(list(self.tombstones.items())):
            if index < excess or tombstone.until <= now:
                del self.tombstones[node]

    def _revive(self, now: float, member: Member, record: NodeRecord) -> None:
        """A member shows a later life than the one this table judged."""
        if not member.live:
            self._drop_times.pop(record.id)
            self._admit(Member(record, "alive", now, record.incarnation, member.rtt))
            return
        kind: EventKind = "recovered" if member.state == "suspect" else "updated"
        since = now if member.state == "suspect" else member.since
        self.members[record.id] = Member(record, "alive", since, record.incarnation, member.rtt)
        self._events.append(MemberEvent(kind, record))

    def _admit(self, member: Member) -> None:
        self.members[member.record.id] = member
        self._live_others.append(member.record.id)
        self._events.append(MemberEvent("joined", member.record))

    def _set(self, member: Member, **changes: object) -> None:
        self.members[member.record.id] = msgspec.structs.replace(member, **changes)
