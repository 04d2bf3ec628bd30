"""The requests of this node's own clients, of which a node that leaves has to see the end."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio

from pxd.serving.requests import NotReady

RETRY_AFTER_S = 5


class Clients:
    """Counts them. `ended` is called after each."""

    def __init__(self, ended: Callable[[], None] = lambda: None) -> None:
        self.count = 0
        self._ended = ended
        self._refusing = False
        self._over = trio.Event()

    @contextmanager
    def request(self) -> Iterator[None]:
        """Around one request. Raises `NotReady` once no more are taken."""
        if self._refusing:
            raise _gone()
        self.count += 1
        try:
            yield
        finally:
            self.count -= 1
            self._ended()

    def refuse(self) -> None:
        """Take no new requests from now on."""
        self._refusing = True

    def end(self) -> None:
        """Have those end that are there."""
        self._over.set()

    async def wait_over(self) -> NotReady:
        """Return when requests can go on no longer, with what to tell their clients."""
        await self._over.wait()
        return _gone()


def _gone() -> NotReady:
    return NotReady("this node is leaving the cluster; ask another one", RETRY_AFTER_S)
