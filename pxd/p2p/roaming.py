"""Noticing that this machine has moved: other addresses, or a while in which it slept."""

import time
from collections.abc import Callable

import msgspec
import trio

from pxd.p2p.interfaces import Local, local_addresses

INTERVAL = 1.0
"""Seconds between two looks, each of which takes a fraction of a millisecond."""

SLEPT = 5.0
"""Seconds that a look must be late before this machine, or this process, is said to have slept."""


class Moved(msgspec.Struct, frozen=True):
    """`slept` in seconds, 0 for not at all; `lost` and `gained` are addresses with their zones."""

    slept: float = 0.0
    lost: frozenset[str] = frozenset()
    gained: frozenset[str] = frozenset()

    def __str__(self) -> str:
        words = [f"slept for {self.slept:.0f} s"] if self.slept else []
        if self.lost:
            words.append(f"lost {', '.join(sorted(self.lost))}")
        if self.gained:
            words.append(f"now has {', '.join(sorted(self.gained))}")
        return "; ".join(words)


class Watch:
    """Compares one look with the next. Pure; times in seconds.

    A steady clock stands still while some systems sleep, and a wall clock may be set: the later of
    the two counts, since a false alarm costs a ping per connection.
    """

    def __init__(self, steady: float, wall: float, addresses: frozenset[str]) -> None:
        self._steady = steady
        self._wall = wall
        self._addresses = addresses

    def look(self, steady: float, wall: float, addresses: frozenset[str]) -> Moved | None:
        """What happened since the last look, `INTERVAL` ago as this process meant it; or None."""
        late = max(steady - self._steady, wall - self._wall) - INTERVAL
        moved = Moved(
            slept=late if late > SLEPT else 0.0,
            lost=self._addresses - addresses,
            gained=addresses - self._addresses,
        )
        self._steady, self._wall, self._addresses = steady, wall, addresses
        return moved if moved != Moved() else None


class Roaming:
    """`locals` are this machine's addresses as of the last look; works while `run` runs."""

    def __init__(self, look: Callable[[], tuple[Local, ...]] = local_addresses) -> None:
        self._look = look
        self.locals = look()
        self._moved = trio.Event()

    @property
    def moved(self) -> trio.Event:
        """Set, and replaced, once everything else has been told of a move."""
        return self._moved

    async def run(self, moved: Callable[[Moved], None]) -> None:
        """Call `moved` whenever it happened."""
        self.locals = self._look()
        watch = Watch(trio.current_time(), time.time(), self._hosts())
        while True:
            await trio.sleep(INTERVAL)
            self.locals = self._look()
            if news := watch.look(trio.current_time(), time.time(), self._hosts()):
                moved(news)
                self._moved.set()
                self._moved = trio.Event()

    def _hosts(self) -> frozenset[str]:
        # Containers come and go without this machine going anywhere.
        return frozenset(local.zoned for local in self.locals if not local.inside)
