"""Which news still has to be passed on: infection-style gossip with limited retransmissions."""

import math
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

import msgspec

from pxd.cluster.messages import MAX_MESSAGE, Claim, News, SignedRecord

NEWS_BUDGET = MAX_MESSAGE - 512
"""Bytes of news in one message; the rest is for what a message carries besides."""

ItemT = TypeVar("ItemT", SignedRecord, Claim)

_encoder = msgspec.msgpack.Encoder()


def encoded_size(item: SignedRecord | Claim) -> int:
    return len(_encoder.encode(item))


class _Item(Generic[ItemT]):
    def __init__(self, content: ItemT, stamp: int, known_to: Iterable[str]) -> None:
        self.content: ItemT = content
        self.size = encoded_size(content)
        self.stamp = stamp
        self.sent = 0
        self.known_to = set(known_to)


class BroadcastQueue:
    """At most one record and one claim per node: what is newer replaces what is older.

    An item is handed out about `factor` * log10(members) times, least often sent first and the
    latest first among those, and to nobody who has it already: streams rarely lose anything, so
    that in a small cluster every member gets it straight from its source. Memory is bounded by the
    number of nodes.
    """

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._records: dict[str, _Item[SignedRecord]] = {}
        self._claims: dict[str, _Item[Claim]] = {}
        self._stamp = 0

    def __bool__(self) -> bool:
        return bool(self._records or self._claims)

    def push_record(self, record: SignedRecord, *known_to: str) -> None:
        """`known_to` are members that have it, such as the one it came from."""
        self._stamp += 1
        self._records[record.node] = _Item(record, self._stamp, (record.node, *known_to))
        claim = self._claims.get(record.node)
        if claim is not None and claim.content.incarnation < record.incarnation:
            del self._claims[record.node]

    def push_claim(self, claim: Claim, *known_to: str) -> None:
        self._stamp += 1
        self._claims[claim.node] = _Item(claim, self._stamp, known_to)

    def discard(self, node: str) -> None:
        self._records.pop(node, None)
        self._claims.pop(node, None)

    def clear(self) -> None:
        self._records.clear()
        self._claims.clear()

    def take(self, peer: str, others: Collection[str], budget: int = NEWS_BUDGET) -> News:
        """News for one message to `peer` of at most `budget` bytes.

        `others` are all members that news should reach.
        """
        # Claims are small and urgent, so records get what they leave of the budget.
        claims, used = self._take(self._claims, peer, others, budget)
        records, _ = self._take(self._records, peer, others, budget - used)
        return News(tuple(records), tuple(claims))

    def _take(
        self, items: dict[str, _Item[ItemT]], peer: str, others: Collection[str], room: int
    ) -> tuple[list[ItemT], int]:
        limit = self._factor * math.ceil(math.log10(len(others) + 2))
        taken: list[ItemT] = []
        used = 0
        by_need = sorted(items.items(), key=lambda entry: (entry[1].sent, -entry[1].stamp))
        for node, item in by_need:
            if peer not in item.known_to and used + item.size <= room:
                used += item.size
                item.sent += 1
                item.known_to.add(peer)
                taken.append(item.content)
            if item.sent >= limit or item.known_to.issuperset(others):
                del items[node]
        return taken, used
