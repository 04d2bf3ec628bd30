"""One life of a simulated node: drives the state machines as `pxd.p2p.gossip` does.

It sees its own clock only, which started when it liked and goes as fast as it likes, and its disk,
which takes a moment to write.
"""

import math
from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from pxd.cluster.config import MembershipConfig
from pxd.cluster.leadership import Leadership, LeadershipConfig, LeadershipEvent, TookOffice
from pxd.cluster.members import Member, MemberEvent
from pxd.cluster.membership import Membership
from pxd.cluster.messages import GossipMessage
from pxd.cluster.plans import Plan
from pxd.cluster.records import NodeRecord
from pxd.p2p.gossip import HAND_OVER_S, GossipEvent
from tests.cluster.simulated_plans import PlanMessage, SimulatedPlans, Step
from tests.signers import FakeSigner

PERSIST = (0.001, 0.03)
"""Seconds from the wish to store something until it is stored."""


class Disk:
    """What survives a restart."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.term = 0
        self.banned: frozenset[str] = frozenset()


class World(Protocol):
    """What a process needs of the simulator."""

    now: float

    def uniform(self, low: float, high: float) -> float: ...
    def bits(self) -> int: ...
    def enter_at(self, when: float, process: "Process", step: Step, *args: object) -> None: ...
    def send(
        self, source: "Process", target: str, message: GossipMessage | PlanMessage
    ) -> None: ...
    def ring_at(self, when: float, process: "Process") -> None: ...
    def told(self, process: "Process", event: GossipEvent) -> None: ...
    def gone(self, process: "Process") -> None: ...


class Process:
    """`offset` and `rate` are those of its clock: seconds, and seconds per true second."""

    def __init__(
        self,
        world: World,
        record: NodeRecord,
        disk: Disk,
        membership: MembershipConfig,
        leadership: LeadershipConfig,
        *,
        offset: float,
        rate: float,
        expects_peers: bool,
    ) -> None:
        self.name = record.id
        self.disk = disk
        self.events: list[tuple[float, MemberEvent | LeadershipEvent]] = []
        self.frozen = False
        self.slowness = 0.0
        self.busy_until = 0.0
        self.backlog: list[tuple[Step, tuple[object, ...]]] = []
        self.rings_at = math.inf
        self._world = world
        self._offset, self._rate = offset, rate
        self._clock = -math.inf
        self._synced = False
        self._persisted_term = disk.term
        self._persisting = self._to_persist = False
        self._leaving_led: int | None = None
        self.membership = Membership(record, membership, world.bits(), FakeSigner(record.id))
        self.leadership = Leadership(
            record.id, leadership, term=disk.term, expects_peers=expects_peers
        )
        self.plans = SimulatedPlans(self)

    # What others may know of it

    @property
    def members(self) -> Mapping[str, Member]:
        return self.membership.members

    @property
    def leads(self) -> int:
        """As in `Gossip`: a term counts once it is persisted."""
        leads = self.leadership.leads
        return leads if leads <= self._persisted_term else 0

    def happened(self, kind: str, node: str | None = None) -> list[float]:
        """Times at which this process saw a member event."""
        return [
            when
            for when, event in self.events
            if isinstance(event, MemberEvent)
            and event.kind == kind
            and (node is None or event.record.id == node)
        ]

    def terms_taken(self) -> int:
        return sum(isinstance(event, TookOffice) for _, event in self.events)

    def live(self) -> set[str]:
        return {node for node, member in self.members.items() if member.live}

    def knows(self, other: str) -> bool:
        """Whether it would ever try to reach that node, if only as one of the lost."""
        table = self.membership._table
        return other in table.live_others or other in table.lost()

    def states(self) -> dict[str, str]:
        return {node: member.state for node, member in self.members.items()}

    # What the simulator does with it, always followed by `drain`

    def start(self) -> None:
        now = self._now()
        self.membership.start(now)
        self.leadership.start(now)

    def introduce(self, others: Iterable["Process"]) -> None:
        """Let it know others without a message. Nothing of that is an event."""
        membership = self.membership
        membership.synced = self._synced = True
        self.leadership.seniority = membership.record.seniority
        for other in others:
            record = other.membership.record
            signed = other.membership._table.signed[other.name]
            membership._table.learn(self._now(), record, signed)
            membership._prober.admit(other.name)
        membership.take_events()
        self.leadership.observe(self._now(), self.members, synced=True)

    def receive(self, peer: str, message: GossipMessage | PlanMessage) -> None:
        if isinstance(message, PlanMessage):
            self.plans.receive(peer, message)
        else:
            self.membership.receive(self._now(), peer, message)

    def connected(self, peer: str) -> None:
        self.membership.connected(peer)

    def disconnected(self, peer: str) -> None:
        self.membership.disconnected(self._now(), peer)

    def vanished(self, peer: str) -> None:
        self.membership.vanished(self._now(), peer)

    def expel(self, banned: frozenset[str]) -> None:
        self.disk.banned = banned
        self.membership.expel(self._now(), banned)

    def update(self, **changes: Any) -> None:
        self.membership.update(**changes)

    def ring(self) -> None:
        """The alarm: do what is due by this process's own clock."""
        now = self._now()
        if now >= self.membership.next_wakeup:
            self.membership.tick(now)

    def leave(self) -> None:
        """As `Gossip.leave`: who leads waits a moment for another one to take over."""
        if self.leadership.leads:
            self._leaving_led = self.leadership.leads
            self.membership.update(leaving=True)
            self.after(HAND_OVER_S, self._say_goodbye)
        else:
            self._say_goodbye()

    def drain(self) -> None:
        """As `Gossip._dispatch`."""
        while self._step():
            pass
        if self._leaving_led is not None and self._is_handed_over(self._leaving_led):
            self._say_goodbye()
            self._step()
        wakeup = min(self.membership.next_wakeup, self.leadership.next_wakeup)
        if wakeup != math.inf:
            self._world.ring_at(self._true(wakeup), self)

    # What its plans need of it

    def send(self, peer: str, message: PlanMessage) -> None:
        self._world.send(self, peer, message)

    def after(self, seconds: float, step: Step, *args: object) -> None:
        self._world.enter_at(self._world.now + seconds / self._rate, self, step, *args)

    def adopted(self, plan: Plan) -> None:
        self.membership.update(plan=plan.epoch)

    # The driver

    def _now(self) -> float:
        # What is due by the true time must be due by this clock, in spite of rounding.
        exact = self._offset + self._world.now * self._rate + 1e-9
        self._clock = max(self._clock, exact)
        return self._clock

    def _true(self, when: float) -> float:
        return (when - self._offset) / self._rate

    def _step(self) -> bool:
        membership, leadership = self.membership, self.leadership
        events = membership.take_events()
        now = self._now()
        conclusions: list[LeadershipEvent] = []
        if events or now >= leadership.next_wakeup or self._synced != membership.synced:
            self._synced = membership.synced
            conclusions = leadership.observe(
                now,
                membership.members,
                synced=self._synced,
                changed={event.record.id for event in events},
            )
            self._handle(events, conclusions)
        membership.update(seniority=leadership.seniority, term=leadership.term, leads=self.leads)
        outbox = membership.take_outbox()
        for peer, message in outbox:
            self._world.send(self, peer, message)
        return bool(events or conclusions or outbox)

    def _handle(self, events: list[MemberEvent], conclusions: Iterable[LeadershipEvent]) -> None:
        for event in events:
            if event.kind == "refuted":
                self._persist()
            self._tell(event)
        for conclusion in conclusions:
            if isinstance(conclusion, TookOffice):
                self._persist()
            else:
                self._tell(conclusion)
        self.plans.follow(events)
        if self.leads:
            self.plans.inputs_changed()

    def _tell(self, event: GossipEvent) -> None:
        self.events.append((self._world.now, event))
        self._world.told(self, event)

    def _persist(self) -> None:
        self._to_persist = True
        if not self._persisting:
            self._persisting, self._to_persist = True, False
            counters = self.membership.record.incarnation, self.leadership.term
            self.after(self._world.uniform(*PERSIST), self._stored, *counters)

    def _stored(self, incarnation: int, term: int) -> None:
        self.disk.incarnation, self.disk.term = incarnation, term
        before, self._persisted_term = self._persisted_term, term
        if before < self.leadership.leads <= term:
            self._tell(TookOffice(self.leadership.leader, self.leadership.leads))
            self.plans.inputs_changed()
        self._persisting = False
        if self._to_persist:
            self._persist()

    def _is_handed_over(self, led: int) -> bool:
        return self.leadership.leader is None or any(
            member.live and member.record.leads > led for member in self.members.values()
        )

    def _say_goodbye(self) -> None:
        if self.membership.next_wakeup == math.inf:
            return
        self._leaving_led = None
        self.membership.leave(self._now())
        self._world.gone(self)
