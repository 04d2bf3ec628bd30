"""The member table: how records and claims about a node merge into what this node holds true.

Content is ordered by (incarnation, version), liveness by incarnation: a claim holds until the node
shows a greater incarnation, and only the node itself can do that. So tables that have heard the
same agree, in whatever order they heard it.
"""

import math
from typing import Literal

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.endpoints import Endpoints
from pxd.cluster.messages import Claim, MemberState, SignedRecord
from pxd.cluster.records import NodeRecord
from pxd.cluster.roster import Roster
from pxd.cluster.signing import evidence

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

    `incarnation` is the life that `state` is about: the record's, or a greater one that the node
    said goodbye of. `rtt` in seconds, smoothed; None until measured. `proof` is the node's goodbye.
    `vanished` says of one that is dead that nobody listens where it was: silence alone may pass.
    """

    record: NodeRecord
    state: MemberState
    since: float
    incarnation: int
    rtt: float | None = None
    proof: bytes = b""
    vanished: bool = False

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
    """Remembers a dropped node, so that late gossip of its past life does not bring it back.

    `proof` is the node's goodbye, or shows that it had the life that ended.
    """

    state: Literal["dead", "left"]
    incarnation: int
    until: float
    proof: bytes


class MemberTable:
    """All members, this node included, and what has happened to them since `take_events`.

    `signed` holds the members' records as they signed them, ready to be passed on.
    """

    def __init__(self, own: NodeRecord, signed: SignedRecord, config: MembershipConfig) -> None:
        self._config = config
        self._events: list[MemberEvent] = []
        self._dropped: list[str] = []
        self.own_id = own.id
        self.members = {own.id: Member(own, "alive", 0.0, own.incarnation)}
        self.signed = {own.id: signed}
        self.tombstones: dict[str, Tombstone] = {}
        self._bytes = len(signed.content)
        self._endpoints = Endpoints()
        self._live_others = Roster()
        # In order of time, since everybody stays equally long.
        self._drop_times: dict[str, float] = {}
        self._endpoints.put(own)

    @property
    def own(self) -> NodeRecord:
        return self.members[self.own_id].record

    def begin(self, now: float) -> None:
        self._set(self.members[self.own_id], since=now)

    def lost(self) -> list[str]:
        """Nodes that went silent without a goodbye, dropped ones included."""
        buried = [id_ for id_, stone in self.tombstones.items() if stone.state == "dead"]
        return self.dead() + buried

    def dead(self) -> list[str]:
        """Members that went silent without a goodbye."""
        return [id_ for id_ in self._drop_times if self.members[id_].state == "dead"]

    @property
    def live(self) -> int:
        """How many members are there, this node included."""
        return len(self._live_others) + 1

    @property
    def live_others(self) -> Roster:
        """Members not known to be gone, without this node; not to be changed by the caller."""
        return self._live_others

    def replace_own(self, record: NodeRecord, signed: SignedRecord, kind: EventKind) -> None:
        self._set(self.members[self.own_id], record=record, incarnation=record.incarnation)
        self._keep(record, signed)
        self._events.append(MemberEvent(kind, record))

    @property
    def is_full(self) -> bool:
        """Whether there is no room for another node. The gone make way for new ones."""
        return len(self.members) >= self._config.max_members and not self._drop_times

    def has_room(self, signed: SignedRecord) -> bool:
        """Whether the bounds allow for a record, be it of a new node or a known one.

        A fair share of the budget is everybody's.
        """
        held = self.signed.get(signed.node)
        if held is None and self.is_full:
            return False
        size, before = len(signed.content), len(held.content) if held is not None else 0
        fair = self._config.record_budget // self._config.max_members
        return size <= max(before, fair) or (
            self._bytes - before + size <= self._config.record_budget
        )

    def learn(self, now: float, record: NodeRecord, signed: SignedRecord) -> bool:
        """Merge another node's genuine record; says whether it was news."""
        member = self.members.get(record.id)
        if member is None:
            if self.is_buried(record.id, record.incarnation):
                return False
            self.tombstones.pop(record.id, None)
            if len(self.members) >= self._config.max_members and self._drop_times:
                self._drop(now, next(iter(self._drop_times)))
            self._admit(Member(record, "alive", now, record.incarnation))
        elif record.order <= member.record.order:
            return False
        elif record.incarnation > member.incarnation:
            self._revive(now, member, record)
        else:
            self._set(member, record=record)
            if member.live:
                self._events.append(MemberEvent("updated", record))
        self._keep(record, signed)
        if self.members[record.id].live:
            for other in sorted(self._endpoints.sharing(record.id)):
                self._drop_replaced(now, other)
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

    def bury(
        self,
        now: float,
        node: str,
        state: Literal["dead", "left"],
        incarnation: int,
        proof: bytes = b"",
        *,
        vanished: bool = False,
    ) -> None:
        """`proof` is the goodbye of a node that left; `vanished` as in `Member`."""
        member = self.members[node]
        if not member.live:
            # Who died already and is now known to have left first is still gone only once.
            self._set(member, state=state, incarnation=incarnation, proof=proof)
            return
        kind: EventKind = "died" if state == "dead" else "left"
        self._events.append(MemberEvent(kind, member.record))
        changes = {"incarnation": incarnation, "proof": proof, "vanished": vanished}
        self._set(member, state=state, since=now, **changes)
        if node != self.own_id:
            self._live_others.discard(node)
            self._drop_times[node] = now + self._config.drop_after
            if any(self.members[other].live for other in self._endpoints.sharing(node)):
                self._drop_replaced(now, node)

    def expel(self, now: float, node: str) -> None:
        """A member leaves and is dropped at once, and nothing is ever told of it."""
        self.bury(now, node, "left", self.members[node].incarnation)
        self._drop(now, node)
        self.tombstones.pop(node, None)

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
            return Claim(node, member.state, member.incarnation, self.own_id, member.proof)
        tombstone = self.tombstones.get(node)
        if tombstone is None:
            return None
        return Claim(node, tombstone.state, tombstone.incarnation, self.own_id, tombstone.proof)

    def expire(self, now: float) -> None:
        """Drop those gone long enough."""
        while self.next_expiry <= now:
            self._drop(now, next(iter(self._drop_times)))

    @property
    def next_expiry(self) -> float:
        return next(iter(self._drop_times.values()), math.inf)

    def take_dropped(self) -> list[str]:
        """Who is no longer in the table, for those who keep something about members."""
        dropped, self._dropped = self._dropped, []
        return dropped

    def take_events(self) -> list[MemberEvent]:
        events, self._events = self._events, []
        return events

    def _drop_replaced(self, now: float, node: str) -> None:
        """Another node has a dead one's address: that machine is back under a new identity."""
        if self.members[node].state == "dead":
            self._drop(now, node)

    def _drop(self, now: float, node: str) -> None:
        del self._drop_times[node]
        member, signed = self.members.pop(node), self.signed.pop(node)
        self._bytes -= len(signed.content)
        self._endpoints.remove(node)
        until = now + self._config.tombstone_for
        if member.state == "left":
            stone = Tombstone("left", member.incarnation, until, member.proof)
        else:
            stone = Tombstone("dead", member.incarnation, until, evidence(signed))
        self.tombstones.pop(node, None)
        self.tombstones[node] = stone
        self._forget_tombstones(now)
        self._dropped.append(node)
        self._events.append(MemberEvent("dropped", member.record))

    def _forget_tombstones(self, now: float) -> None:
        # In order of time, as they were put up.
        while self.tombstones:
            node, oldest = next(iter(self.tombstones.items()))
            if oldest.until > now and len(self.tombstones) <= self._config.max_tombstones:
                return
            del self.tombstones[node]

    def _keep(self, record: NodeRecord, signed: SignedRecord) -> None:
        held = self.signed.get(record.id)
        self._bytes += len(signed.content) - (len(held.content) if held is not None else 0)
        self.signed[record.id] = signed
        self._endpoints.put(record)

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
        self._live_others.add(member.record.id)
        self._events.append(MemberEvent("joined", member.record))

    def _set(self, member: Member, **changes: object) -> None:
        self.members[member.record.id] = msgspec.structs.replace(member, **changes)
