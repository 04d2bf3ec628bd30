"""What multicast has shown: members, and nodes with another cluster key; bounded, for people."""

import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

CAPACITY = 256


class Sighting(msgspec.Struct, frozen=True):
    """An announcement that came `age_s` seconds ago. `addresses` are multiaddrs."""

    peer: str
    addresses: tuple[str, ...]
    age_s: float


class Discovered(msgspec.Struct, frozen=True):
    """`mdns` is empty while multicast discovery runs, else why it does not."""

    mdns: str
    heard: tuple[Sighting, ...]
    foreign: tuple[Sighting, ...]


class _Seen:
    def __init__(self) -> None:
        self._latest: OrderedDict[str, tuple[tuple[str, ...], float]] = OrderedDict()

    def add(self, peer: str, addresses: tuple[str, ...], now: float) -> None:
        self._latest[peer] = (addresses, now)
        self._latest.move_to_end(peer)
        if len(self._latest) > CAPACITY:
            self._latest.popitem(last=False)

    def forget(self, peer: str) -> None:
        self._latest.pop(peer, None)

    def told(self, now: float) -> tuple[Sighting, ...]:
        return tuple(
            Sighting(peer, addresses, round(now - at, 3))
            for peer, (addresses, at) in self._latest.items()
        )


class Sightings:
    """The latest announcement per node, at most `CAPACITY` of members and as many of others."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._members = _Seen()
        self._foreign = _Seen()
        self.problem = ""

    def member(self, peer: str, addresses: tuple[str, ...]) -> None:
        """It may have been foreign before a change of keys."""
        self._foreign.forget(peer)
        self._members.add(peer, addresses, self._clock())

    def stranger(self, peer: str, addresses: tuple[str, ...]) -> None:
        self._members.forget(peer)
        self._foreign.add(peer, addresses, self._clock())

    def gone(self, peer: str) -> None:
        """It said goodbye."""
        self._members.forget(peer)
        self._foreign.forget(peer)

    def told(self) -> Discovered:
        now = self._clock()
        return Discovered(self.problem, self._members.told(now), self._foreign.told(now))
