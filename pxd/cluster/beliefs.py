"""What a node holds true of the others: news is taken in, members are suspected and buried.

The rules are SWIM's: a later life beats an earlier one, a record of a later version an earlier one,
and only the node itself can refute what is said against it. See `pxd.cluster.membership`.
"""

import math
from typing import Literal

from pxd.cluster.admission import Admission
from pxd.cluster.anti_entropy import ENTRIES, deltas
from pxd.cluster.awareness import Awareness
from pxd.cluster.config import MembershipConfig
from pxd.cluster.dissemination import BroadcastQueue
from pxd.cluster.members import EventKind, Member, MemberTable, standing
from pxd.cluster.messages import Claim, Delta, News, SignedRecord
from pxd.cluster.probing import Prober
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import Signer, seal
from pxd.cluster.suspicion import Suspicions
from pxd.cluster.voice import Voice

Occasion = Literal["gossip", "answer", "first answers"]
"""How news came: unasked, or because this node asked; first of all for all there is."""

_STILL_VANISHED = 5.0
"""Seconds for which it counts that nobody listens where a node was; transports try again."""


class Beliefs:
    """Works on the parts that `Membership` is made of; sends nothing itself."""

    def __init__(
        self,
        config: MembershipConfig,
        signer: Signer,
        table: MemberTable,
        queue: BroadcastQueue,
        prober: Prober,
        awareness: Awareness,
    ) -> None:
        self._id = table.own.id
        self.expelled: frozenset[str] = frozenset()
        self.suspicions = Suspicions(config)
        self.voice = Voice(config)
        self.admission = Admission(table, signer, config)
        self._config = config
        self._signer = signer
        self._table = table
        self._queue = queue
        self._prober = prober
        self._awareness = awareness
        self._sought: dict[str, int] = {}
        self._vanished: dict[str, float] = {}

    def expel(self, now: float, nodes: frozenset[str]) -> None:
        """As `Membership.expel`."""
        self.expelled = nodes - {self._id}
        for node in self.expelled & self._table.members.keys():
            self._table.expel(now, node)
            self.suspicions.end(node)
            self._prober.forget(node)

    def forget(self, node: str) -> None:
        """The node is no longer in the table."""
        self._sought.pop(node, None)
        self._vanished.pop(node, None)
        self.admission.forget(node)

    def vanished(self, now: float, node: str) -> None:
        """Nobody listens any more where a member was."""
        crowd = max(1.0, math.log10(self._table.live))
        latest = self._vanished[node] = now + self._config.vanished_timeout * crowd
        self.suspicions.hasten(node, latest)

    def reached(self, node: str) -> None:
        """The transport has a connection with it."""
        if self._vanished.pop(node, None) is not None:
            self.suspicions.relent(node)

    def absorb(self, now: float, peer: str, news: News, occasion: Occasion) -> list[Delta]:
        """Take news in; returns what to tell the peer that it has missed, and to ask it for."""
        heard = [self._hear_record(now, peer, record, occasion) for record in news.records]
        corrections = {claim.node: claim for claim in heard if claim is not None}
        unseen = [claim.node for claim in news.claims if self._hear_claim(now, peer, claim)]
        if corrections or unseen:
            told = list(corrections.values())[:ENTRIES]
            return list(deltas((), told, unseen[:ENTRIES]))
        return []

    def _hear_record(
        self, now: float, peer: str, signed: SignedRecord, occasion: Occasion
    ) -> Claim | None:
        """Returns what to tell a peer that has missed the node's end."""
        table, node = self._table, signed.node
        if node in self.expelled:
            return None
        held = table.signed.get(node)
        if held is not None and (signed.order < held.order or signed == held):
            return None
        if node == self._id:
            if self.admission.is_genuine(now, peer, signed):
                # An earlier life went further than this node remembers.
                self.voice.slandered(signed.incarnation)
                self.refute(now)
            return None
        if table.is_buried(node, signed.incarnation):
            return table.claim_about(node) if peer != node else None
        expected = occasion == "first answers"
        record = self.admission.open(now, peer, signed, expected=expected)
        if record is not None and table.learn(now, record, signed):
            if held is None:
                self._prober.admit(node)
            if table.members[node].state == "alive":
                self.exonerate(node)
            new_life = held is None or signed.incarnation > held.incarnation
            if self._is_rumour(occasion, new_life):
                self._queue.push_record(signed, peer)
        return None

    def _is_rumour(self, occasion: Occasion, new_life: bool) -> bool:
        """Whether to pass on a record. In a crowd others ask for themselves, and what is new to a
        newcomer is so to nobody else."""
        if occasion == "gossip" or self._table.live <= self._config.flat_members:
            return True
        return new_life and occasion == "answer"

    def _hear_claim(self, now: float, peer: str, claim: Claim) -> bool:
        """Says whether the claim is about a life that the node has not shown here yet."""
        if claim.node == self._id:
            self._hear_slander(now, peer, claim)
            return False
        member = self._table.members.get(claim.node)
        if member is None or claim.incarnation < member.incarnation:
            return False
        if claim.state == "left":
            later = standing("left", claim.incarnation) > member.standing
            if later and self.admission.is_proven(now, peer, claim):
                self.bury(now, claim)
                self._queue.push_claim(claim, claim.by)
            return False
        if claim.incarnation > member.record.incarnation:
            # Once per life: what the peer sends then may be refused here.
            seeks = claim.incarnation > self._sought.get(claim.node, 0)
            self._sought[claim.node] = claim.incarnation
            return seeks
        if member.live:
            self.suspect(now, member, claim.incarnation, claim.by)
        return False

    def _hear_slander(self, now: float, peer: str, claim: Claim) -> None:
        own = self._table.own.incarnation
        if claim.incarnation < own:
            return
        doubted = claim.incarnation == own and claim.state != "left"
        if doubted or self.admission.is_proven(now, peer, claim):
            self.voice.slandered(claim.incarnation)
            self.refute(now)

    def refute(self, now: float) -> None:
        record = self.voice.refutation(now, self._table.own)
        if record is not None:
            self._awareness.worsen()
            self.set_own(record, "refuted")
            self._queue.push_record(self._table.signed[self._id])

    def set_own(self, record: NodeRecord, kind: EventKind) -> None:
        self._table.replace_own(record, seal(record, self._signer), kind)

    def exonerate(self, node: str) -> None:
        """The node has been heard of as of now."""
        self.suspicions.end(node)
        self._vanished.pop(node, None)

    def suspect(self, now: float, member: Member, incarnation: int, accuser: str) -> None:
        node = member.record.id
        if self.suspicions.accuse(now, node, incarnation):
            self._table.suspect(now, node, incarnation)
            if self._vanished.get(node, 0.0) > now:
                self.suspicions.hasten(node, self._vanished[node])
        if self.suspicions.confirm(node, accuser):
            self._queue.push_claim(Claim(node, "suspect", incarnation, accuser), accuser)

    def bury(self, now: float, claim: Claim) -> None:
        state: Literal["dead", "left"] = "left" if claim.state == "left" else "dead"
        table = self._table
        # Somebody else may have been first to declare it dead.
        vanished = self._vanished.get(claim.node, -math.inf) + _STILL_VANISHED > now
        table.bury(now, claim.node, state, claim.incarnation, claim.proof, vanished=vanished)
        self.suspicions.end(claim.node)
        self._prober.forget(claim.node)

    def bury_expired(self, now: float) -> None:
        """Suspected members whose time to speak up is over are dead."""
        for node, incarnation in self.suspicions.expired(now, self._table.live):
            self.bury(now, Claim(node, "dead", incarnation, self._id))
