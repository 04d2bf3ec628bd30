"""Who is in the cluster: SWIM as a state machine without clock, network or chance of its own.

After "SWIM: Scalable Weakly-consistent Infection-style Process Group Membership Protocol" (Das,
Gupta, Motivala 2002) and HashiCorp's memberlist, with three differences. News travels on ordered
streams and may be large. Full synchronisation exchanges digests first. A death is never hearsay:
what another member calls dead this node only suspects, so that a healed partition does not bury
members that merely have to speak up. Records and goodbyes are signed by the node that they are of,
so that another member can lie about who answers it, and about nothing else.
"""

import math
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import msgspec

from pxd.cluster.admission import Refusal, RefusalReason
from pxd.cluster.anti_entropy import compare, deltas, differing, digests, summary
from pxd.cluster.awareness import Awareness
from pxd.cluster.beliefs import Beliefs, Occasion
from pxd.cluster.config import MembershipConfig
from pxd.cluster.dissemination import BroadcastQueue
from pxd.cluster.members import Member, MemberEvent, MemberTable
from pxd.cluster.messages import (
    LAST_COUNT,
    Ack,
    Delta,
    Digest,
    GossipMessage,
    Nack,
    News,
    Ping,
    PingRequest,
    Summary,
)
from pxd.cluster.prng import SplitMix64
from pxd.cluster.probing import Prober
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import Signer, goodbye, seal

_MAX_ASKED = 4096


class Membership:
    """One node's view of the cluster. Time is any steadily growing number of seconds.

    After every call the driver sends what `take_outbox` returns, handles `take_events`, and sees to
    it that `tick` is called at `next_wakeup`. Messages may be lost, doubled and reordered.
    `members` is a live view that includes this node. `synced` says that some member has answered
    with all it knew.
    """

    def __init__(
        self, record: NodeRecord, config: MembershipConfig, seed: int, signer: Signer
    ) -> None:
        """`record.incarnation` must be greater than that of every earlier life of this node."""
        self.id = record.id
        self.synced = False
        self._config = config
        self._random = SplitMix64(seed)
        self._signer = signer
        self._table = MemberTable(record, seal(record, signer), config)
        self._queue = BroadcastQueue(config.retransmissions)
        self._awareness = Awareness(config.max_ill_health)
        self._prober = Prober(config, self._random, self._awareness)
        self._beliefs = Beliefs(
            config, signer, self._table, self._queue, self._prober, self._awareness
        )
        self._connected: set[str] = set()
        self._strangers: set[str] = set()
        self._parted: set[str] = set()
        self._asked: set[str] = set()
        self._outbox: list[tuple[str, GossipMessage]] = []
        self._running = False
        self._called_at = self._promised = 0.0
        self._probe_at = self._gossip_at = self._sync_at = self._reconnect_at = math.inf

    @property
    def members(self) -> Mapping[str, Member]:
        return MappingProxyType(self._table.members)

    @property
    def record(self) -> NodeRecord:
        """This node's own record as it is gossiped now."""
        return self._table.own

    @property
    def health(self) -> int:
        """How badly this node itself keeps up: 0 is healthy, `max_ill_health` the worst."""
        return self._awareness.score

    @property
    def refused(self) -> Mapping[RefusalReason, int]:
        """How much of what others sent was not let in, since the start."""
        return MappingProxyType(self._beliefs.admission.refused)

    def start(self, now: float) -> None:
        config = self._config
        self._running = True
        self._called_at = now
        self._table.begin(now)
        self._probe_at = now + config.probe_interval * self._random.fraction()
        self._sync_at = now + config.sync_interval * self._random.fraction()
        self._reconnect_at = now + config.reconnect_interval
        self._gossip_at = now
        self._promised = self.next_wakeup

    def join(self, peer: str) -> None:
        """Synchronise fully with a peer, whether it is known yet or not."""
        if self._running and peer != self.id and peer not in self._beliefs.expelled:
            if len(self._asked) >= _MAX_ASKED:
                self._asked.pop()
            self._asked.add(peer)
            self._outbox.extend((peer, digest) for digest in digests(self._table))

    def connected(self, peer: str) -> None:
        """The transport has an admitted connection: exchange what may have been missed."""
        self._connected.add(peer)
        self._beliefs.reached(peer)
        member = self._table.members.get(peer)
        if member is None:
            self._strangers.add(peer)
        parted = peer in self._parted
        self._parted.discard(peer)
        if not self.synced:
            # Who comes back is met by everybody at once, and a few can tell it all there is.
            if len(self._asked) < self._config.gossip_fanout:
                self.join(peer)
        elif member is None or not member.live:
            self.join(peer)
        elif parted and self._running:
            # Other connections are made in a running cluster, between members that gossip reaches.
            self._outbox.append((peer, summary(self._table)))

    def disconnected(self, now: float, peer: str) -> None:
        """The transport lost a connection: ask at once whether the peer is still there."""
        self._forgive_freeze(now)
        self._connected.discard(peer)
        self._strangers.discard(peer)
        member = self._table.members.get(peer)
        if member is None:
            return
        self._parted.add(peer)
        if self._running and member.state == "alive":
            seq = self._prober.begin_urgent(now, peer)
            if seq is not None:
                self._ping(peer, seq)
                self._ask_others(now)
            self._promised = self.next_wakeup

    def vanished(self, now: float, peer: str) -> None:
        """The transport was told that nobody listens any more where the peer was: its process has
        ended, unless others still reach it elsewhere."""
        self._forgive_freeze(now)
        member = self._table.members.get(peer)
        if self._running and member is not None and member.live and peer not in self._connected:
            self._beliefs.vanished(now, peer)
            self._promised = self.next_wakeup

    def update(self, **changes: Any) -> None:
        """Change this node's record; its version grows if anything really changed.

        Others hear of many changes at once, and of mere load less often than of the rest. Raises
        ValueError for the fields that the protocol itself sets.
        """
        fixed = {"id", "incarnation", "version"} & changes.keys()
        if fixed:
            raise ValueError(f"membership sets {sorted(fixed)} itself")
        old = self._table.own
        changed = frozenset(name for name in changes if getattr(old, name) != changes[name])
        if changed:
            version = min(old.version + 1, LAST_COUNT)
            self._beliefs.set_own(
                msgspec.structs.replace(old, **changes, version=version), "updated"
            )
            self._beliefs.voice.changed(changed, self._table.own)

    def expel(self, now: float, nodes: frozenset[str]) -> None:
        """From now on exactly these nodes have no part in the cluster, as far as this one goes.

        Those that are members leave at once, and nothing is heard from or about them.
        """
        self._beliefs.expel(now, nodes)
        self._finish()

    def leave(self, now: float) -> None:
        """Say goodbye to the connected members and go silent. The outbox then holds goodbyes."""
        if not self._running:
            return
        self._running = False
        own = self._table.own
        proof = goodbye(self.id, own.incarnation, self._signer)
        self._table.bury(now, self.id, "left", own.incarnation, proof)
        others = self._table.live_others
        peers = [peer for peer in others if peer in self._connected]
        peers = peers or self._random.sample(others, self._config.gossip_fanout)
        claim = self._table.claim_about(self.id)
        assert claim is not None
        self._outbox = [(peer, Delta(news=News(claims=(claim,)))) for peer in peers]

    def take_outbox(self) -> list[tuple[str, GossipMessage]]:
        """Messages to send, with their receivers; none of them may block the others."""
        outbox, self._outbox = self._outbox, []
        return outbox

    def take_events(self) -> list[MemberEvent]:
        return self._table.take_events()

    def take_refusals(self) -> list[Refusal]:
        """What to tell people about news that was not let in."""
        return self._beliefs.admission.take_refusals()

    @property
    def next_wakeup(self) -> float:
        if not self._running:
            return math.inf
        live = self._table.live
        return min(
            self._probe_at,
            self._sync_at,
            self._reconnect_at,
            self._gossip_at if self._queue else math.inf,
            self._beliefs.voice.next_wakeup(self._table.own, live),
            self._prober.next_wakeup,
            self._table.next_expiry,
            self._beliefs.suspicions.next_deadline(live),
        )

    def tick(self, now: float) -> None:
        """Do what is due. Calling it early or late is harmless."""
        if not self._running:
            return
        self._forgive_freeze(now)
        self._beliefs.refute(now)
        for requester, seq in self._prober.due_nacks(now):
            self._outbox.append((requester, Nack(seq=seq, news=self._news_for(requester))))
        self._ask_others(now)
        for target in self._prober.take_failed(now):
            self._accuse(now, target)
        self._beliefs.bury_expired(now)
        self._table.expire(now)
        if now >= self._probe_at:
            for _ in range(self._prober.width):
                self._probe_next(now)
            self._greet_strangers()
            self._probe_at = now + self._config.probe_interval * self._awareness.scale
        if now >= self._sync_at:
            self._sync_at = now + self._sync_interval()
            for peer in self._random.sample(self._table.live_others, 1):
                self._synchronise(peer)
        if now >= self._reconnect_at:
            self._reconnect_at = now + self._config.reconnect_interval
            self._seek_lost()
        if self._beliefs.voice.is_due(now, self._table.live):
            self._queue.push_record(self._table.signed[self.id])
        if self._queue and now >= self._gossip_at:
            self._gossip_at = now + self._config.gossip_interval
            self._gossip()
        self._finish()

    def receive(self, now: float, peer: str, message: GossipMessage) -> None:
        """Handle a message; `peer` must come from the authenticated connection."""
        if not self._running or peer == self.id or peer in self._beliefs.expelled:
            return
        self._forgive_freeze(now)
        if not isinstance(message, Digest | Summary):
            asked = isinstance(message, Delta) and message.answer
            answer: Occasion = "answer" if self.synced else "first answers"
            self._absorb(now, peer, message.news, answer if asked else "gossip")
        match message:
            case Ping():
                self._outbox.append((peer, Ack(seq=message.seq, news=self._news_for(peer))))
                if peer not in self._table.members and peer not in self._asked:
                    self.join(peer)
            case Ack():
                self._acknowledged(now, peer, message.seq)
            case PingRequest():
                self._ping_for(now, peer, message)
            case Nack():
                self._prober.deny(peer, message.seq)
            case Summary():
                self._answer_summary(now, peer, message)
            case Digest():
                self._answer_digest(now, peer, message)
            case Delta():
                self._answer_delta(now, peer, message)
        self._finish()

    def _finish(self) -> None:
        for node in self._table.take_dropped():
            self._queue.discard(node)
            self._parted.discard(node)
            self._beliefs.forget(node)
            if node in self._connected:
                self._strangers.add(node)
        self._promised = self.next_wakeup

    def _forgive_freeze(self, now: float) -> None:
        """After a time in which this node was frozen nobody is blamed for not having answered:
        the answers may be waiting unread. Before anything else, or what is begun now would be put
        off, too."""
        if not self._running:
            return
        late = now - max(self._called_at, self._promised)
        self._called_at = now
        if late > self._config.lateness:
            grace = late + self._config.probe_timeout
            self._prober.postpone(grace)
            self._beliefs.suspicions.postpone(grace)

    def _absorb(self, now: float, peer: str, news: News, occasion: Occasion) -> None:
        answers = self._beliefs.absorb(now, peer, news, occasion)
        self._outbox.extend((peer, answer) for answer in answers)

    # What is found out

    def _probe_next(self, now: float) -> None:
        target = self._prober.next_target(self._table.live_others)
        if target is not None:
            # The time to make a connection is no round trip time.
            seq = self._prober.begin(now, target, timed=target in self._connected)
            self._ping(target, seq)
        elif not self._table.live_others:
            self._awareness.improve()

    def _greet_strangers(self) -> None:
        """A connected peer that is no member either missed a digest or has to refute its death."""
        members = self._table.members
        self._strangers = {peer for peer in self._strangers if peer not in members}
        dead = [peer for peer in self._table.dead() if peer in self._connected]
        strangers = sorted((*self._strangers, *dead))
        for peer in self._random.sample(strangers, self._config.gossip_fanout):
            self.join(peer)

    def _ask_others(self, now: float) -> None:
        for seq, probe in self._prober.due_indirect(now):
            helpers = self._choose_helpers(probe.target)
            self._prober.ask(probe, helpers, self._connected)
            for peer in helpers:
                request = PingRequest(seq=seq, target=probe.target, news=self._news_for(peer))
                self._outbox.append((peer, request))

    def _choose_helpers(self, target: str) -> list[str]:
        """Rather those whom it takes no time to reach."""
        others = [peer for peer in self._table.live_others if peer != target]
        near = [peer for peer in others if peer in self._connected]
        count = self._config.indirect_probes
        helpers = self._random.sample(near, count)
        if len(helpers) < count:
            far = [peer for peer in others if peer not in self._connected]
            helpers += self._random.sample(far, count - len(helpers))
        return helpers

    def _ping_for(self, now: float, requester: str, request: PingRequest) -> None:
        if request.target == self.id:
            self._outbox.append((requester, Ack(seq=request.seq, news=self._news_for(requester))))
        elif request.target in self._table.members:
            seq = self._prober.relay(now, request.target, requester, request.seq)
            if seq is not None:
                self._ping(request.target, seq)
        else:
            # Nor can it be found out here; the requester must not take that for its own fault.
            self._outbox.append((requester, Nack(seq=request.seq, news=self._news_for(requester))))

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
            self._beliefs.suspect(now, member, member.incarnation, self.id)
            self._tell(target, target)

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

    def _synchronise(self, peer: str) -> None:
        if self.synced:
            self._outbox.append((peer, summary(self._table)))
        else:
            self.join(peer)

    def _answer_summary(self, now: float, peer: str, message: Summary) -> None:
        if self.synced:
            different = self._beliefs.admission.answer(now, peer, differing(self._table, message))
            self._outbox.extend((peer, digest) for digest in different)

    def _answer_digest(self, now: float, peer: str, digest: Digest) -> None:
        heard = tuple(entry for entry in digest.entries if entry.node not in self._beliefs.expelled)
        difference = compare(self._table, peer, msgspec.structs.replace(digest, entries=heard))
        self._absorb(now, peer, News(claims=tuple(difference.heard)), "gossip")
        records = self._beliefs.admission.answer(now, peer, difference.records)
        answers = deltas(records, difference.claims, difference.wants)
        self._outbox.extend((peer, answer) for answer in answers)

    def _answer_delta(self, now: float, peer: str, delta: Delta) -> None:
        if delta.answer and peer in self._asked:
            self._asked.discard(peer)
            self.synced = True
        wanted = dict.fromkeys(node for node in delta.wants if node in self._table.members)
        if wanted:
            held = [self._table.signed[node] for node in wanted]
            records = self._beliefs.admission.answer(now, peer, held)
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

    def _sync_interval(self) -> float:
        """Grows with the logarithm of the members beyond the number for which it is meant."""
        crowd = self._table.live / self._config.flat_members
        doublings = max(0, math.ceil(math.log2(crowd)))
        return self._config.sync_interval * (1 + doublings)
