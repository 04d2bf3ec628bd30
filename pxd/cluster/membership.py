"""Who is in the cluster: SWIM as a state machine without clock, network or chance of its own.

After "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (Das,
Gupta, Motivala 2002) and HashiCorp's memberlist, with three differences. News travels on ordered
streams and may be large. Full synchronisation exchanges digests first. A death is never hearsay:
what another member calls dead this node only suspects, so that a healed partition does not bury
members that merely have to speak up.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, Literal

import msgspec

from pxd.cluster.anti_entropy import compare, deltas, digests
from pxd.cluster.config import MembershipConfig
from pxd.cluster.dissemination import BroadcastQueue
from pxd.cluster.members import EventKind, Member, MemberEvent, MemberTable
from pxd.cluster.messages import (
    Ack,
    Claim,
    Delta,
    Digest,
    GossipMessage,
    News,
    Ping,
    PingRequest,
)
from pxd.cluster.prng import SplitMix64
from pxd.cluster.probing import Prober
from pxd.cluster.records import NodeRecord
from pxd.cluster.suspicion import Suspicion

_SYNC_SCALE = 32
"""Members up to which full syncs keep their interval; beyond, it grows with the logarithm."""


class Membership:
    """One node's view of the cluster. Time is any steadily growing number of seconds.

    After every call the driver sends what `take_outbox` returns, handles `take_events`, and sees to
    it that `tick` is called at `next_wakeup`. Messages may be lost, doubled and reordered.
    `members` is a live view that includes this node. `synced` says that some member has answered
    with all it knew.
    """

    def __init__(self, record: NodeRecord, config: MembershipConfig, seed: int) -> None:
        """`record.incarnation` must be greater than that of every earlier life of this node."""
        self.id = record.id
        self.synced = False
        self._config = config
        self._random = SplitMix64(seed)
        self._table = MemberTable(record, config)
        self._queue = BroadcastQueue(config.retransmissions)
        self._prober = Prober(config, self._random)
        self._suspicions: dict[str, Suspicion] = {}
        self._connected: set[str] = set()
        self._parted: set[str] = set()
        self._asked: set[str] = set()
        self._outbox: list[tuple[str, GossipMessage]] = []
        self._running = False
        self._called_at = 0.0
        self._probe_at = self._gossip_at = self._sync_at = self._reconnect_at = math.inf

    @property
    def members(self) -> Mapping[str, Member]:
        return MappingProxyType(self._table.members)

    @property
    def record(self) -> NodeRecord:
        """This node's own record as it is gossiped now."""
        return self._table.own

    def start(self, now: float) -> None:
        config = self._config
        self._running = True
        self._called_at = now
        self._table.begin(now)
        self._probe_at = now + config.probe_interval * self._random.fraction()
        self._sync_at = now + config.sync_interval * self._random.fraction()
        self._reconnect_at = now + config.reconnect_interval
        self._gossip_at = now

    def join(self, peer: str) -> None:
        """Synchronise fully with a peer, whether it is known yet or not."""
        if self._running and peer != self.id:
            self._asked.add(peer)
            self._outbox.extend((peer, digest) for digest in digests(self._table))

    def connected(self, peer: str) -> None:
        """The transport has an admitted connection: exchange what may have been missed."""
        self._connected.add(peer)
        member = self._table.members.get(peer)
        # Most connections are made in a running cluster, between members that gossip reaches.
        in_touch = member is not None and member.state == "alive" and peer not in self._parted
        self._parted.discard(peer)
        if not (self.synced and in_touch):
            self.join(peer)

    def disconnected(self, now: float, peer: str) -> None:
        """The transport lost a connection: ask at once whether the peer is still there."""
        self._connected.discard(peer)
        self._parted.add(peer)
        member = self._table.members.get(peer)
        if self._running and member is not None and member.state == "alive":
            seq = self._prober.begin_urgent(now, peer)
            self._ping(peer, seq)
            self._ask_others(now)

    def update(self, **changes: Any) -> None:
        """Change this node's record; its version grows if anything really changed.

        Raises ValueError for the fields that the protocol itself sets.
        """
        fixed = {"id", "incarnation", "version"} & changes.keys()
        if fixed:
            raise ValueError(f"membership sets {sorted(fixed)} itself")
        old = self._table.own
        new = msgspec.structs.replace(old, **changes)
        if new != old:
            self._publish(msgspec.structs.replace(new, version=old.version + 1), "updated")

    def leave(self, now: float) -> None:
        """Say goodbye to the connected members and go silent. The outbox then holds goodbyes."""
        if not self._running:
            return
        self._running = False
        own = self._table.own
        self._table.bury(now, self.id, "left", own.incarnation)
        others = self._table.live_others
        peers = [peer for peer in others if peer in self._connected]
        peers = peers or self._random.sample(others, self._config.gossip_fanout)
        goodbye = Delta(news=News(claims=(Claim(self.id, "left", own.incarnation, self.id),)))
        self._outbox = [(peer, goodbye) for peer in peers]

    def take_outbox(self) -> list[tuple[str, GossipMessage]]:
        """Messages to send, with their receivers; none of them may block the others."""
        outbox, self._outbox = self._outbox, []
        return outbox

    def take_events(self) -> list[MemberEvent]:
        return self._table.take_events()

    @property
    def next_wakeup(self) -> float:
        if not self._running:
            return math.inf
        live = self._live()
        return min(
            self._probe_at,
            self._sync_at,
            self._reconnect_at,
            self._gossip_at if self._queue else math.inf,
            self._prober.next_wakeup,
            self._table.next_expiry,
            *(s.deadline(live, self._config) for s in self._suspicions.values()),
        )

    def tick(self, now: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        if not self._running:
            return
        self._forgive_freeze(now)
        self._ask_others(now)
        for target in self._prober.take_failed(now):
            self._accuse(now, target)
        self._bury_expired(now)
        for node in self._table.expire(now):
            self._queue.discard(node)
            self._parted.discard(node)
        if now >= self._probe_at:
            self._probe_at = now + self._config.probe_interval
            self._probe_next(now)
            self._greet_strangers()
        if now >= self._sync_at:
            self._sync_at = now + self._sync_interval()
            for peer in self._random.sample(self._table.live_others, 1):
                self.join(peer)
        if now >= self._reconnect_at:
            self._reconnect_at = now + self._config.reconnect_interval
            self._seek_lost()
        if self._queue and now >= self._gossip_at:
            self._gossip_at = now + self._config.gossip_interval
            self._gossip()

    def receive(self, now: float, peer: str, message: GossipMessage) -> None:
        """Handle a message; `peer` must come from the authenticated connection."""
        if not self._running or peer == self.id:
            return
        self._forgive_freeze(now)
        if not isinstance(message, Digest):
            self._absorb(now, peer, message.news)
        match message:
            case Ping():
                self._outbox.append((peer, Ack(seq=message.seq, news=self._news_for(peer))))
                if peer not in self._table.members:
                    self.join(peer)
            case Ack():
                self._acknowledged(now, peer, message.seq)
            case PingRequest():
                self._ping_for(now, peer, message)
            case Digest():
                self._answer_digest(now, peer, message)
            case Delta():
                self._answer_delta(peer, message)

    def _forgive_freeze(self, now: float) -> None:
        """After a time in which this node was frozen nobody is blamed for not having answered:
        the answers may be waiting unread."""
        late = now - max(self._called_at, self.next_wakeup)
        self._called_at = now
        if late > self._config.lateness:
            grace = late + self._config.probe_timeout
            self._prober.postpone(grace)
            for suspicion in self._suspicions.values():
                suspicion.started += grace

    # What is heard

    def _absorb(self, now: float, peer: str, news: News) -> None:
        for record in news.records:
            self._hear_record(now, peer, record)
        for claim in news.claims:
            self._hear_claim(now, claim)

    def _hear_record(self, now: float, peer: str, record: NodeRecord) -> None:
        if record.id == self.id:
            own = self._table.own
            if record.order > own.order or (record.order == own.order and record != own):
                self._refute(record.incarnation)
            return
        known = record.id in self._table.members
        if self._table.learn(now, record):
            if not known:
                self._prober.admit(record.id)
            if self._table.members[record.id].state == "alive":
                self._suspicions.pop(record.id, None)
            self._queue.push_record(record, peer)
        elif self._table.is_buried(record.id, record.incarnation) and peer != record.id:
            self._tell(peer, record.id)

    def _hear_claim(self, now: float, claim: Claim) -> None:
        if claim.node == self.id:
            if claim.incarnation >= self._table.own.incarnation:
                self._refute(claim.incarnation)
            return
        member = self._table.members.get(claim.node)
        if member is None or claim.incarnation < member.incarnation:
            return
        if claim.state == "left":
            if member.state != "left":
                self._bury(now, claim)
                self._queue.push_claim(claim, claim.by)
        elif member.live:
            self._suspect(now, member, claim.incarnation, claim.by)

    def _refute(self, incarnation: int) -> None:
        """Outbid what others say of this node."""
        record = msgspec.structs.replace(self._table.own, incarnation=incarnation + 1)
        self._publish(record, "refuted")

    def _publish(self, record: NodeRecord, kind: EventKind) -> None:
        self._table.replace_own(record, kind)
        self._queue.push_record(record)

    def _suspect(self, now: float, member: Member, incarnation: int, accuser: str) -> None:
        node = member.record.id
        suspicion = self._suspicions.get(node)
        if suspicion is None or incarnation > suspicion.incarnation:
            suspicion = self._suspicions[node] = Suspicion(incarnation, now)
            self._table.suspect(now, node, incarnation)
        if suspicion.confirm(accuser, self._config):
            self._queue.push_claim(Claim(node, "suspect", incarnation, accuser), accuser)

    def _bury(self, now: float, claim: Claim) -> None:
        state: Literal["dead", "left"] = "left" if claim.state == "left" else "dead"
        self._table.bury(now, claim.node, state, claim.incarnation)
        self._suspicions.pop(claim.node, None)
        self._prober.forget(claim.node)

    # What is found out

    def _probe_next(self, now: float) -> None:
        target = self._prober.next_target(self._table.live_others)
        if target is not None:
            # The time to make a connection is no round trip time.
            seq = self._prober.begin(now, target, timed=target in self._connected)
            self._ping(target, seq)

    def _greet_strangers(self) -> None:
        """A connected peer that is no member either missed a digest or has to refute its death."""
        for peer in sorted(self._connected):
            member = self._table.members.get(peer)
            if member is None or member.state == "dead":
                self.join(peer)

    def _ask_others(self, now: float) -> None:
        for seq, probe in self._prober.due_indirect(now):
            others = [peer for peer in self._table.live_others if peer != probe.target]
            helpers = self._random.sample(others, self._config.indirect_probes)
            probe.helpers = frozenset(helpers)
            for peer in helpers:
                request = PingRequest(seq=seq, target=probe.target, news=self._news_for(peer))
                self._outbox.append((peer, request))

    def _ping_for(self, now: float, requester: str, request: PingRequest) -> None:
        if request.target == self.id:
            self._outbox.append((requester, Ack(seq=request.seq, news=self._news_for(requester))))
        elif request.target in self._table.members:
            seq = self._prober.relay(now, request.target, requester, request.seq)
            if seq is not None:
                self._ping(request.target, seq)

    def _acknowledged(self, now: float, peer: str, seq: int) -> None:
        probe = self._prober.acknowledge(peer, seq)
        if probe is not None:
            if probe.timed and peer == probe.target and peer in self._table.members:
                self._table.measure(peer, now - probe.sent)
        elif (relay := self._prober.relayed(peer, seq)) is not None:
            requester, their_seq = relay
            self._outbox.append((requester, Ack(seq=their_seq, news=self._news_for(requester))))

    def _accuse(self, now: float, target: str) -> None:
        member = self._table.members.get(target)
        if member is not None and member.live:
            self._suspect(now, member, member.incarnation, self.id)
            self._tell(target, target)

    def _bury_expired(self, now: float) -> None:
        live = self._live()
        for node, suspicion in list(self._suspicions.items()):
            if suspicion.deadline(live, self._config) <= now:
                self._bury(now, Claim(node, "dead", suspicion.incarnation, self.id))

    # What is passed on

    def _gossip(self) -> None:
        peers = self._random.sample(self._table.live_others, self._config.gossip_fanout)
        if not peers:
            # Whoever comes later learns everything from a digest.
            self._queue.clear()
        for peer in peers:
            news = self._queue.take(peer, self._table.live_others)
            if news.records or news.claims:
                self._outbox.append((peer, Delta(news=news)))

    def _seek_lost(self) -> None:
        """Now and then try one of the dead, all members together about once per interval each."""
        lost = self._table.lost()
        live = len(self._table.live_others)
        if lost and self._random.fraction() * live < len(lost):
            self.join(self._random.sample(lost, 1)[0])

    def _answer_digest(self, now: float, peer: str, digest: Digest) -> None:
        difference = compare(self._table, peer, digest)
        for claim in difference.heard:
            self._hear_claim(now, claim)
        answers = deltas(difference.records, difference.claims, difference.wants)
        self._outbox.extend((peer, answer) for answer in answers)

    def _answer_delta(self, peer: str, delta: Delta) -> None:
        if peer in self._asked:
            self._asked.discard(peer)
            self.synced = True
        wanted = [node for node in delta.wants if node in self._table.members]
        if wanted:
            records = [self._table.members[node].record for node in wanted]
            claims = [claim for node in wanted if (claim := self._table.claim_about(node))]
            self._outbox.extend((peer, answer) for answer in deltas(records, claims, ()))

    def _ping(self, target: str, seq: int) -> None:
        self._outbox.append((target, Ping(seq=seq, news=self._news_for(target))))

    def _tell(self, peer: str, node: str) -> None:
        claim = self._table.claim_about(node)
        if claim is not None:
            self._outbox.append((peer, Delta(news=News(claims=(claim,)))))

    def _news_for(self, peer: str) -> News:
        """Queued news, and always what would make `peer` speak up for itself."""
        news = self._queue.take(peer, self._table.live_others)
        claim = self._table.claim_about(peer)
        if claim is None:
            return news
        return News(news.records, (*news.claims, claim))

    def _live(self) -> int:
        return len(self._table.live_others) + 1

    def _sync_interval(self) -> float:
        doublings = max(0, math.ceil(math.log2(self._live() / _SYNC_SCALE)))
        return self._config.sync_interval * (1 + doublings)
