"""Bounds on connections that have not been admitted yet, so that strangers cannot lock the door."""

from collections.abc import Iterator
from contextlib import contextmanager

import trio

PER_ADDRESS = 32
TOTAL = 128


class PendingConnections:
    """At most so many at once per remote address and altogether.

    Beyond that the oldest is given up, not the newest refused: an honest peer is through in
    milliseconds, and what has been pending for long is most likely a half-open socket.
    """

    def __init__(self, per_address: int = PER_ADDRESS, total: int = TOTAL) -> None:
        self._per_address = per_address
        self._total = total
        self._scopes: dict[trio.CancelScope, str] = {}

    def __len__(self) -> int:
        return len(self._scopes)

    @contextmanager
    def admit(self, address: str, *, within: float) -> Iterator[trio.CancelScope]:
        """Cancel the block after `within` seconds, or earlier when room is needed."""
        if self._count(address) >= self._per_address:
            self._evict(address)
        elif len(self._scopes) >= self._total:
            self._evict(max(set(self._scopes.values()), key=self._count))
        with trio.move_on_after(within) as scope:
            self._scopes[scope] = address
            try:
                yield scope
            finally:
                self._scopes.pop(scope, None)

    def _count(self, address: str) -> int:
        return sum(other == address for other in self._scopes.values())

    def _evict(self, address: str) -> None:
        oldest = next(scope for scope, other in self._scopes.items() if other == address)
        del self._scopes[oldest]
        oldest.cancel()
