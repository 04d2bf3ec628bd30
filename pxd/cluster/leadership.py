"""Who leads: derived from the membership view, never negotiated.

Every node computes the same leader from the same view, among live members that have settled and
are not about to leave: the greatest priority, then who is in office in the latest term, then the
smallest seniority (the place in join order), then the smallest id. Whoever was away and has been
followed does not take the lead back, so that leaders do not take turns. A leader that is merely
silent is given time, and more of it where others are silent, too, or where leaders have just
changed: the network may be what is at fault, and the members' views with it. Most of it is given by
a node that hears nobody at all, since that is rather its own fault. Two leaders for a moment are
harmless: a plan carries its term, and only the derived leader goes on to take terms that are
greater than all it has seen.
"""

import math
from collections.abc import Iterable, Mapping

import msgspec

from pxd.cluster.members import Member
from pxd.cluster.messages import LAST_COUNT


class LeadershipConfig(msgspec.Struct, frozen=True, kw_only=True):
    """Seconds. A node takes its place in join order `settle_alone` after its start if it expects
    nobody, else `settle` after it has synchronised with a member, or `settle_lonely` after its
    start. It takes office once it has been the leader for `stable`. A leader that died without a
    trace is waited for, for `patience`, and within `calm` after a change of leaders or after
    somebody else fell silent for `long_patience`; for `deaf_patience` by a node that hears nobody
    of several."""

    settle_alone: float = 0.3
    settle: float = 1.0
    settle_lonely: float = 6.0
    stable: float = 1.0
    calm: float = 60.0
    patience: float = 5.0
    long_patience: float = 12.0
    deaf_patience: float = 20.0


class LeadershipEvent(msgspec.Struct, frozen=True):
    """Something to act on: `leader` and `term` as of the event."""

    leader: str | None
    term: int


class LeaderChanged(LeadershipEvent, frozen=True):
    """The derived leader is another one than before; None while nobody has settled."""


class TookOffice(LeadershipEvent, frozen=True):
    """This node leads as of `term`, which must be persisted before anybody hears of it."""


class LeftOffice(LeadershipEvent, frozen=True):
    """This node no longer leads: another one is the derived leader, or this one is leaving."""


class Leadership:
    """One node's part in it. Feed it every change of the membership view, and call it again at
    `next_wakeup`. `seniority`, `term` and `leads` belong into this node's record."""

    def __init__(
        self, node: str, config: LeadershipConfig, *, term: int, expects_peers: bool
    ) -> None:
        """`term` is the greatest one persisted; `expects_peers` says that there is a ticket or
        that peers are remembered, so that an older cluster may exist."""
        self.leader: str | None = None
        self.term = term
        self.leads = 0
        self.seniority = 0
        self.next_wakeup = math.inf
        self._node = node
        self._config = config
        self._expects_peers = expects_peers
        self._started = 0.0
        self._synced_at: float | None = None
        self._office_at = math.inf
        self._changed_at = -math.inf
        self._silent_since: float | None = None
        self._patience = 0.0
        self._contested = False
        self._candidates = _Candidates()
        # Those whose terms are too great to be believed, for now.
        self._ahead: set[str] = set()

    @property
    def in_office(self) -> bool:
        return self.leads > 0

    def start(self, now: float) -> None:
        self._started = now
        self.next_wakeup = now

    def observe(
        self,
        now: float,
        members: Mapping[str, Member],
        *,
        synced: bool,
        changed: Iterable[str] | None = None,
        most: int = LAST_COUNT,
    ) -> list[LeadershipEvent]:
        """Draw the conclusions from a view; `synced` as in `Membership`.

        `changed` are all nodes of whom something was told since the last call, so that it costs no
        more than they do; None stands for all there are. Terms above `most`, for which see
        `pxd.cluster.stamps`, are passed over: one absurd record must not use up all there are, nor
        make this node count up to them.
        """
        if changed is None:
            self._candidates.clear()
        news = self._ahead.union(members if changed is None else changed)
        told = (term for node in news if node in members for term in _terms(members[node]))
        self.term = max(self.term, max((term for term in told if term <= most), default=0))
        self._settle(now, members, synced)
        self._rank(members, news)
        events = self._follow(now, members)
        events += self._govern(now, members)
        self.next_wakeup = self._wakeup(members)
        return events

    def _settle(self, now: float, members: Mapping[str, Member], synced: bool) -> None:
        if synced and self._synced_at is None:
            self._synced_at = now
        if self.seniority == 0 and now >= self._settle_at:
            last = max(member.record.seniority for member in members.values())
            self.seniority = min(1 + last, LAST_COUNT)

    @property
    def _settle_at(self) -> float:
        if self._synced_at is not None:
            return self._synced_at + self._config.settle
        alone = not self._expects_peers
        return self._started + (self._config.settle_alone if alone else self._config.settle_lonely)

    def _follow(self, now: float, members: Mapping[str, Member]) -> list[LeadershipEvent]:
        leader = self._candidates.first()
        if leader == self.leader:
            self._silent_since = None
            return []
        before = members.get(self.leader) if self.leader is not None else None
        if self._is_patient(now, before, members):
            return []
        self._silent_since = None
        if before is not None and before.record.leads:
            self._changed_at = now
        handed_over = before is not None and (before.state == "left" or before.record.leaving)
        alone = not any(m.live for id_, m in members.items() if id_ != self._node)
        self._office_at = now if handed_over or alone else now + self._config.stable
        self.leader = leader
        return [LeaderChanged(leader, self.term)]

    def _is_patient(self, now: float, leader: Member | None, members: Mapping[str, Member]) -> bool:
        if leader is None or leader.state != "dead" or leader.vanished or not leader.record.leads:
            return False
        if self._silent_since is None:
            self._silent_since, self._patience = now, 0.0
        # As long as it was called for at any time meanwhile.
        self._patience = max(self._patience, self._patience_with(now, leader, members))
        return now < self._silent_since + self._patience

    def _patience_with(self, now: float, leader: Member, members: Mapping[str, Member]) -> float:
        config = self._config
        calm = now - config.calm
        others = [m for m in members.values() if m is not leader and m.record.id != self._node]
        unrest = any(_is_silent(member, calm) for member in others)
        if unrest and not any(member.state == "alive" for member in others):
            return config.deaf_patience
        return config.long_patience if unrest or self._changed_at > calm else config.patience

    def _govern(self, now: float, members: Mapping[str, Member]) -> list[LeadershipEvent]:
        if self.leader != self._node:
            if not self.in_office:
                return []
            self.leads = 0
            return [LeftOffice(self.leader, self.term)]
        if self.in_office:
            contested = self._is_contested(members)
            if contested and not self._contested:
                # After a partition the later term is heard of before its holder is: give way to it.
                self._office_at = max(self._office_at, now + self._config.stable)
            self._contested = contested
            if not contested:
                return []
        if now < self._office_at:
            return []
        self.term = min(self.term + 1, LAST_COUNT)
        self.leads, self._contested = self.term, False
        # Should views differ for long, terms must not race each other.
        self._office_at = now + self._config.stable
        return [TookOffice(self.leader, self.term)]

    def _is_contested(self, members: Mapping[str, Member]) -> bool:
        """Whether somebody's plans could beat those of this node's term."""
        if self.term > self.leads:
            return True
        # Somebody else may have made up a plan in this node's name.
        own = members[self._node].record.plan
        return any(
            (record.id != self._node and record.leads == self.leads)
            or (
                plan is not None
                and plan.term == self.leads
                and (plan.leader != self._node or own is None or plan > own)
            )
            for record in (member.record for member in members.values())
            for plan in (record.plan,)
        )

    def _rank(self, members: Mapping[str, Member], news: Iterable[str]) -> None:
        self._ahead.clear()
        for node in (self._node, *news):
            member = members.get(node)
            self._candidates.put(node, self._rating(member) if member is not None else None)
            if member is not None and max(_terms(member)) > self.term:
                self._ahead.add(node)

    def _rating(self, member: Member) -> "_Rating | None":
        """The smallest one leads; None for who is no candidate."""
        record = member.record
        own = record.id == self._node
        seniority = self.seniority if own else record.seniority
        leads = self.leads if own else record.leads
        if not member.live or record.leaving or seniority == 0:
            return None
        incumbency = leads if leads <= self.term else 0
        return -record.priority, -incumbency, seniority, record.id

    def _wakeup(self, members: Mapping[str, Member]) -> float:
        if self.seniority == 0:
            return self._settle_at
        if self._silent_since is not None:
            return self._silent_since + self._patience
        waits = self.leader == self._node and (not self.in_office or self._is_contested(members))
        return self._office_at if waits else math.inf


def _is_silent(member: Member, since: float) -> bool:
    """Whether a member does not answer, and nobody knows why; of the dead, since that time."""
    gone = member.state == "dead" and not member.vanished and member.since > since
    return member.state == "suspect" or gone


def _terms(member: Member) -> tuple[int, int, int]:
    record = member.record
    return record.term, record.leads, record.plan.term if record.plan is not None else 0


_Rating = tuple[int, int, int, str]


class _Candidates:
    """Who comes first, looked up anew only when the first one falls back."""

    def __init__(self) -> None:
        self._ratings: dict[str, _Rating] = {}
        self._first: _Rating | None = None

    def clear(self) -> None:
        self._ratings.clear()
        self._first = None

    def put(self, node: str, rating: _Rating | None) -> None:
        before = self._ratings.pop(node, None)
        if rating is not None:
            self._ratings[node] = rating
        if before is not None and before == self._first and before != rating:
            self._first = min(self._ratings.values(), default=None)
        elif rating is not None and (self._first is None or rating < self._first):
            self._first = rating

    def first(self) -> str | None:
        return self._first[3] if self._first is not None else None
