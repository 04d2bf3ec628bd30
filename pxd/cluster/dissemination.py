"""Which news still has to be passed on: infection-style gossip with limited retransmissions."""

import math
from collections.abc import Collection, Iterable
from typing import Generic, TypeVar

import msgspec

from pxd.cluster.messages import MAX_MESSAGE, Claim, News, SignedRecord

NEWS_BUDGET = MAX_MESSAGE - 512
"""Bytes of news in one message; the rest is for what a message carries besides."""

_LOOKED_AT = 256
"""Items considered for one message, so that a message costs the same however many wait."""

ItemT = TypeVar("ItemT", SignedRecord, Claim)

_NO_NEWS = News()
_encoder = msgspec.msgpack.Encoder()


def encoded_size(item: SignedRecord | Claim) -> int:
    return len(_encoder.encode(item))


class _Item(Generic[ItemT]):
    def __init__(self, content: ItemT, known_to: Iterable[str]) -> None:
        self.content: ItemT = content
        self.size = encoded_size(content)
        self.sent = 0
        self.known_to = set(known_to)


class _Shelf(Generic[ItemT]):
    """Items by node, and their nodes by how often they were sent, each in order of arrival."""

    def __init__(self) -> None:
        self._items: dict[str, _Item[ItemT]] = {}
        self._by_sent: list[dict[str, None]] = []

    def __len__(self) -> int:
        return len(self._items)

    def get(self, node: str) -> ItemT | None:
        item = self._items.get(node)
        return item.content if item is not None else None

    def put(self, node: str, item: _Item[ItemT]) -> None:
        self.discard(node)
        self._items[node] = item
        self._place(node, item)

    def discard(self, node: str) -> None:
        item = self._items.pop(node, None)
        if item is not None:
            del self._by_sent[item.sent][node]

    def clear(self) -> None:
        self._items.clear()
        self._by_sent.clear()

    def take(
        self, peer: str, others: Collection[str], limit: int, room: int
    ) -> tuple[list[ItemT], int]:
        """What of it to tell `peer`, and its bytes. Forgets what has been told often enough."""
        taken: list[ItemT] = []
        used = 0
        if not self._items:
            return taken, used
        for node in self._neediest():
            item = self._items[node]
            if peer not in item.known_to and used + item.size <= room:
                used += item.size
                taken.append(item.content)
                del self._by_sent[item.sent][node]
                item.sent += 1
                item.known_to.add(peer)
                self._place(node, item)
            if item.sent >= limit or _covers(item.known_to, others):
                self.discard(node)
        return taken, used

    def _neediest(self) -> list[str]:
        """Least often sent first, and the latest first among those."""
        nodes: list[str] = []
        for level in self._by_sent:
            for node in reversed(level):
                if len(nodes) == _LOOKED_AT:
                    return nodes
                nodes.append(node)
        return nodes

    def _place(self, node: str, item: _Item[ItemT]) -> None:
        while len(self._by_sent) <= item.sent:
            self._by_sent.append({})
        self._by_sent[item.sent][node] = None


class BroadcastQueue:
    """At most one record and one claim per node: what is newer replaces what is older.

    An item is handed out about `factor` * log10(members) times, least often sent first and the
    latest first among those, and to nobody who has it already: streams rarely lose anything, so
    that in a small cluster every member gets it straight from its source. Memory is bounded by the
    number of nodes.
    """

    def __init__(self, factor: int) -> None:
        self._factor = factor
        self._records: _Shelf[SignedRecord] = _Shelf()
        self._claims: _Shelf[Claim] = _Shelf()

    def __bool__(self) -> bool:
        return bool(self._records or self._claims)

    def push_record(self, record: SignedRecord, *known_to: str) -> None:
        """`known_to` are members that have it, such as the one it came from."""
        self._records.put(record.node, _Item(record, (record.node, *known_to)))
        claim = self._claims.get(record.node)
        if claim is not None and claim.incarnation < record.incarnation:
            self._claims.discard(record.node)

    def push_claim(self, claim: Claim, *known_to: str) -> None:
        self._claims.put(claim.node, _Item(claim, known_to))

    def discard(self, node: str) -> None:
        self._records.discard(node)
        self._claims.discard(node)

    def clear(self) -> None:
        self._records.clear()
        self._claims.clear()

    def take(self, peer: str, others: Collection[str], budget: int = NEWS_BUDGET) -> News:
        """News for one message to `peer` of at most `budget` bytes.

        `others` are all members that news should reach.
        """
        if not self:
            return _NO_NEWS
        limit = self._factor * math.ceil(math.log10(len(others) + 2))
        # Claims are small and urgent, so records get what they leave of the budget.
        claims, used = self._claims.take(peer, others, limit, budget)
        records, _ = self._records.take(peer, others, limit, budget - used)
        return News(tuple(records), tuple(claims))


def _covers(known_to: set[str], others: Collection[str]) -> bool:
    return len(known_to) >= len(others) and known_to.issuperset(others)
