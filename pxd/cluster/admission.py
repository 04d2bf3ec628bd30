"""What news is let in: genuine, within bounds, and no faster than one peer or node may tell it.

The cheapest checks come first, so that a member gone bad costs others little.
"""

from collections import Counter
from typing import Literal, TypeVar

import msgspec

from pxd.cluster.allowance import Allowance
from pxd.cluster.config import MembershipConfig
from pxd.cluster.members import MemberTable
from pxd.cluster.messages import Claim, Digest, SignedRecord
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import Signer, is_genuine, is_proven, unseal

RefusalReason = Literal["forged", "full", "flood"]

AnswerT = TypeVar("AnswerT", SignedRecord, Digest)

_MAX_PEERS = 1024
_FORGERY_COSTS = 32


class Refusal(msgspec.Struct, frozen=True):
    """News of `node` that came from `peer` was not let in.

    `forged`: the signature is not the node's, or it signed nonsense. `full`: the cluster has as
    many nodes, or as large records, as this node holds. `flood`: the peer sends more than is looked
    at, or the node changes its record too often; the latest version comes later.
    """

    reason: RefusalReason
    peer: str
    node: str


class _Peer:
    """What a connected peer may still cost."""

    def __init__(self, config: MembershipConfig) -> None:
        self.verifications = Allowance(config.verify_rate, config.verify_burst)
        self.answers = Allowance(config.answer_rate, config.answer_burst)
        self.newcomers = Allowance(config.newcomer_rate, config.newcomer_burst)


class Admission:
    """Decides on news. `refused` counts, by reason, what was not let in."""

    def __init__(self, table: MemberTable, signer: Signer, config: MembershipConfig) -> None:
        self._table = table
        self._signer = signer
        self._config = config
        self._peers: dict[str, _Peer] = {}
        self._changes: dict[str, Allowance] = {}
        self._told: dict[tuple[RefusalReason, str], None] = {}
        self._refusals: list[Refusal] = []
        self._full: Refusal | None = None
        self.refused: Counter[RefusalReason] = Counter()

    def open(
        self, now: float, peer: str, signed: SignedRecord, *, expected: bool = False
    ) -> NodeRecord | None:
        """The record of another node if it is newer than the one held and let in.

        `expected` says that this node wants to hear of all there are.
        """
        member = self._table.members.get(signed.node)
        if member is not None and signed.order <= member.record.order:
            return None
        if not self._table.has_room(signed):
            self._refuse("full", peer, signed.node)
            return None
        changes = self._changes.get(signed.node)
        if changes is not None and not changes.has(now):
            self._refuse("flood", peer, signed.node)
            return None
        if member is None and not expected and not self._peer(peer).newcomers.take(now):
            # Whoever is really there is still told of when this one asks for all there are.
            self._refuse("flood", peer, signed.node)
            return None
        if not self.is_genuine(now, peer, signed):
            return None
        record = unseal(signed)
        if record is None:
            self._refuse("forged", peer, signed.node)
            return None
        if changes is None:
            # Twice what an honest node sends, since its news may arrive in bunches.
            rate, burst = self._config.record_rate, self._config.record_burst
            changes = self._changes[signed.node] = Allowance(2 * rate, 2 * burst)
        changes.take(now)
        return record

    def is_genuine(self, now: float, peer: str, signed: SignedRecord) -> bool:
        if not self._may_verify(now, peer, signed.node):
            return False
        return self._judge(now, peer, signed.node, is_genuine(signed, self._signer))

    def is_proven(self, now: float, peer: str, claim: Claim) -> bool:
        if not claim.proof or not self._may_verify(now, peer, claim.node):
            return False
        return self._judge(now, peer, claim.node, is_proven(claim, self._signer))

    def answer(self, now: float, peer: str, items: list[AnswerT]) -> list[AnswerT]:
        """Those that a peer may be sent because it asked for them."""
        return items[: self._peer(peer).answers.take_up_to(now, len(items))]

    def forget(self, node: str) -> None:
        """The node is no longer in the table."""
        self._changes.pop(node, None)

    def take_refusals(self) -> list[Refusal]:
        """Those not told before, one per peer, and the first one since the last call of `full`."""
        refusals = self._refusals + ([self._full] if self._full else [])
        self._refusals, self._full = [], None
        return refusals

    def _may_verify(self, now: float, peer: str, node: str) -> bool:
        if self._peer(peer).verifications.take(now):
            return True
        self._refuse("flood", peer, node)
        return False

    def _judge(self, now: float, peer: str, node: str, genuine: bool) -> bool:
        if not genuine:
            # An honest member passes on nothing that it has not verified itself.
            self._peer(peer).verifications.take_up_to(now, _FORGERY_COSTS)
            self._refuse("forged", peer, node)
        return genuine

    def _refuse(self, reason: RefusalReason, peer: str, node: str) -> None:
        self.refused[reason] += 1
        if reason == "full":
            self._full = self._full or Refusal(reason, peer, node)
        elif (reason, peer) not in self._told:
            self._told[reason, peer] = None
            self._refusals.append(Refusal(reason, peer, node))
            if len(self._told) > _MAX_PEERS:
                del self._told[next(iter(self._told))]

    def _peer(self, peer: str) -> _Peer:
        known = self._peers.get(peer)
        if known is None:
            if len(self._peers) >= _MAX_PEERS:
                del self._peers[next(iter(self._peers))]
            known = self._peers[peer] = _Peer(self._config)
        return known
