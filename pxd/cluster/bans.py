"""Who was kicked out: a map that every member holds, merged entry by entry, in any order.

An entry of greater (stamp, banned, by, name) replaces the one held about the same peer. Tables that
have heard the same entries are equal as long as no more than `MAX_BANS` peers were ever named.
"""

import hashlib
from collections.abc import Iterable
from typing import Annotated

import msgspec

from pxd.cluster.messages import LAST_COUNT
from pxd.wire import Count, Identifier

MAX_BANS = 1024


class Ban(msgspec.Struct, frozen=True, array_like=True):
    """`peer`, whom people call `name`, is banned or let in again, on the word of `by`.

    A new entry takes the greatest stamp of the whole table plus one.
    """

    peer: Identifier
    stamp: Count
    banned: bool
    by: Annotated[str, msgspec.Meta(max_length=128)]
    name: Annotated[str, msgspec.Meta(max_length=64)] = ""

    @property
    def order(self) -> tuple[int, bool, str, str]:
        return self.stamp, self.banned, self.by, self.name


BanList = Annotated[tuple[Ban, ...], msgspec.Meta(max_length=MAX_BANS)]


class BanTable:
    """At most `MAX_BANS` entries; beyond that pardons go before bans, old ones before new ones."""

    def __init__(self, bans: Iterable[Ban] = ()) -> None:
        self._bans = {ban.peer: ban for ban in bans}

    @property
    def entries(self) -> tuple[Ban, ...]:
        """In order of peer id, so that equal tables look the same."""
        return tuple(self._bans[peer] for peer in sorted(self._bans))

    @property
    def banned(self) -> frozenset[str]:
        return frozenset(ban.peer for ban in self._bans.values() if ban.banned)

    @property
    def is_full(self) -> bool:
        """No further peer can be banned without another one being forgotten."""
        return len(self.banned) >= MAX_BANS

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(msgspec.msgpack.encode(self.entries)).digest()

    def get(self, peer: str) -> Ban | None:
        return self._bans.get(peer)

    def next(self, peer: str, *, banned: bool, by: str, name: str = "") -> Ban:
        """An entry that replaces whatever is held about `peer`."""
        return Ban(peer, min(self._greatest() + 1, LAST_COUNT), banned, by, name)

    def merge(self, others: Iterable[Ban], ceiling: int = LAST_COUNT) -> "BanTable":
        """A table that knows both; this one stays as it is. Stamps above `ceiling`, for which see
        `pxd.cluster.stamps`, are passed over."""
        merged = dict(self._bans)
        for ban in others:
            held = merged.get(ban.peer)
            if ban.stamp <= ceiling and (held is None or ban.order > held.order):
                merged[ban.peer] = ban
        kept = sorted(merged.values(), key=lambda ban: (ban.banned, ban.stamp, ban.peer))
        return BanTable(kept[-MAX_BANS:])

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BanTable) and self._bans == other._bans

    __hash__ = None  # type: ignore[assignment]

    def _greatest(self) -> int:
        return max((ban.stamp for ban in self._bans.values()), default=0)
