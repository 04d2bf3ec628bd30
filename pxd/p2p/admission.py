"""Whom this node lets in: the keys that count now, and the peers that no key helps."""

import time
from collections.abc import Callable

from pxd.identity import Keyring


class Admission:
    """Looked at anew for every connection, so that it may change while the node runs."""

    def __init__(self, ring: Keyring, clock: Callable[[], float] = time.time) -> None:
        self.ring = ring
        self.banned: frozenset[str] = frozenset()
        self._clock = clock

    def keys(self) -> tuple[bytes, ...]:
        """Those that open the door now, the newest first."""
        return self.ring.keys(self._clock())

    def retired(self) -> tuple[bytes, ...]:
        """Those that no longer do: their holders can be told what happened."""
        return self.ring.retired(self._clock())
