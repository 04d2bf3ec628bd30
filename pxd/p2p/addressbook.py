"""Where peers can be found: what they said of themselves, and what worked; bounded, and on disk."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from pxd.identity import write_private
from pxd.p2p.addresses import Address, parse_peer_addresses
from pxd.wire import DECODE_ERRORS

log = logging.getLogger("pxd.p2p")

PEERS = 1024
ADDRESSES_PER_PEER = 16
REMEMBER_SECONDS = 30 * 86400.0


class RememberedPeer(msgspec.Struct, frozen=True):
    """A peer that has been in; `seen` in seconds since the epoch."""

    peer: Annotated[str, msgspec.Meta(max_length=128)]
    addresses: Annotated[
        tuple[Annotated[str, msgspec.Meta(max_length=512)], ...],
        msgspec.Meta(max_length=ADDRESSES_PER_PEER),
    ]
    seen: float


_File = Annotated[tuple[RememberedPeer, ...], msgspec.Meta(max_length=PEERS)]


def has_met_others(path: Path) -> bool:
    """Whether any peer has ever been in, as far as the file of an address book can tell."""
    try:
        return bool(msgspec.json.decode(path.read_bytes()))
    except FileNotFoundError:
        return False
    except (OSError, *DECODE_ERRORS):
        return True


class AddressBook:
    """Addresses by peer, those that worked last first.

    `pinned` ones, which a person gave, are tried after what the peer says of itself.
    """

    def __init__(
        self,
        path: Path,
        pinned: Mapping[str, tuple[Address, ...]] | None = None,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._path = path
        self._pinned = pinned or {}
        self._clock = clock
        self._addresses: OrderedDict[str, tuple[Address, ...]] = OrderedDict()
        self._told: dict[str, frozenset[Address]] = {}
        self._seen: dict[str, float] = {}
        self.changed = False

    def load(self) -> None:
        """Read the peers of an earlier life; without a usable file there are none."""
        try:
            remembered = msgspec.json.decode(self._path.read_bytes(), type=_File)
        except FileNotFoundError:
            return
        except (OSError, *DECODE_ERRORS) as error:
            log.warning("cannot use the remembered peers in %s: %s", self._path, error)
            return
        for entry in remembered:
            addresses = parse_peer_addresses(entry.peer, entry.addresses, names=True)
            if addresses and entry.seen > self._clock() - REMEMBER_SECONDS:
                self.learn(entry.peer, tuple(addresses))
                self._seen[entry.peer] = entry.seen
        self.changed = False

    def snapshot(self) -> bytes:
        """What `load` reads. Marks the book as unchanged."""
        self.changed = False
        entries = tuple(
            RememberedPeer(peer, tuple(map(str, addresses)), self._seen[peer])
            for peer, addresses in self._addresses.items()
            if peer in self._seen
        )
        return msgspec.json.format(msgspec.json.encode(entries))

    def save(self, data: bytes) -> None:
        """Blocks; for a worker thread."""
        write_private(self._path, data)

    def remembered(self) -> tuple[str, ...]:
        """Peers that have been in, in this life or an earlier one."""
        return tuple(self._seen)

    def addresses(self, peer: str) -> tuple[Address, ...]:
        return tuple(dict.fromkeys((*self._addresses.get(peer, ()), *self._pinned.get(peer, ()))))

    def learn(self, peer: str, addresses: tuple[Address, ...]) -> bool:
        """What the peer says of itself replaces what it said before, but what works stays first.

        Returns whether the peer said something else the last time.
        """
        known = self._addresses.get(peer, ())
        kept = tuple(a for a in known[:1] if a in addresses or peer in self._seen)
        merged = tuple(dict.fromkeys((*kept, *addresses)))[:ADDRESSES_PER_PEER]
        if merged and merged != known:
            self._put(peer, merged)
        news = peer in self._addresses and self._told.get(peer) != frozenset(addresses)
        if news:
            self._told[peer] = frozenset(addresses)
        return news

    def worked(self, address: Address) -> None:
        """A connection was made there and the peer is in."""
        address = address.without_zone()
        others = (a for a in self._addresses.get(address.peer, ()) if a != address)
        self._put(address.peer, (address, *others)[:ADDRESSES_PER_PEER])
        self.seen(address.peer)

    def seen(self, peer: str) -> None:
        """The peer is in. Matters only where an address of it is known, now or later."""
        self._seen.pop(peer, None)
        self._seen[peer] = self._clock()
        while len(self._seen) > PEERS:
            del self._seen[next(iter(self._seen))]
        self.changed = True

    def _put(self, peer: str, addresses: tuple[Address, ...]) -> None:
        self._addresses[peer] = addresses
        self._addresses.move_to_end(peer)
        self.changed = True
        while len(self._addresses) > PEERS:
            forgotten, _ = self._addresses.popitem(last=False)
            self._seen.pop(forgotten, None)
            self._told.pop(forgotten, None)
