"""Why peers were not let in and why dials failed: kept for people, logged without flooding."""

import logging
import time
from collections import OrderedDict
from collections.abc import Callable

import msgspec

CAPACITY = 256
QUIET_SECONDS = 600.0

log = logging.getLogger("pxd.p2p")


class Refusal(msgspec.Struct, frozen=True):
    """`at` is in seconds since the epoch; `address` or `peer` is empty where it is not known.

    `message` is the whole sentence that was logged, where one was.
    """

    address: str
    peer: str
    reason: str
    at: float
    message: str = ""


class Refusals:
    """The latest reason per address and peer, at most `CAPACITY` of them."""

    def __init__(self, clock: Callable[[], float] = time.time) -> None:
        self._clock = clock
        self._latest: OrderedDict[tuple[str, str], Refusal] = OrderedDict()
        self._warned: OrderedDict[tuple[str, str], float] = OrderedDict()

    def latest(self) -> tuple[Refusal, ...]:
        """Oldest first."""
        return tuple(self._latest.values())

    def note(self, address: str, peer: str, reason: str, message: str = "") -> None:
        self._latest.pop((address, peer), None)
        self._latest[address, peer] = Refusal(address, peer, reason, self._clock(), message)
        if len(self._latest) > CAPACITY:
            self._latest.popitem(last=False)

    def forget(self, peer: str) -> None:
        """The peer is in: what was wrong before is of no interest any more."""
        for key in [key for key in self._latest if key[1] == peer]:
            del self._latest[key]

    def warn(self, address: str, peer: str, reason: str, message: str) -> None:
        """Note it, and log `message` unless the same was logged for `address` a short while ago."""
        self.note(address, peer, reason, message)
        key = (address, reason)
        now = self._clock()
        if now - self._warned.get(key, float("-inf")) < QUIET_SECONDS:
            return
        self._warned.pop(key, None)
        self._warned[key] = now
        if len(self._warned) > CAPACITY:
            self._warned.popitem(last=False)
        log.warning("%s", message)
