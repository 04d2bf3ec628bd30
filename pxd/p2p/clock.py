"""How far another member's clock is from this one's, by NTP's formula (RFC 5905, section 8)."""

import time
from collections.abc import Callable
from typing import Annotated

import msgspec

from pxd.p2p.network import Method, Network

SAMPLES = 3

Seconds = Annotated[float, msgspec.Meta(ge=-1e15, le=1e15)]


class ClockAsk(msgspec.Struct, frozen=True):
    """Tell me your time."""


class ClockSays(msgspec.Struct, frozen=True):
    """The answering node's wall clock when the question came, in seconds since the epoch."""

    now: Seconds


CLOCK = Method("pxd.clock", ClockAsk, ClockSays)


class Offset(msgspec.Struct, frozen=True):
    """`seconds` by which the peer's clock is ahead of this one's, right to within `uncertainty`."""

    seconds: float
    uncertainty: float


class Clock:
    """Serves `CLOCK` and asks others. `wall` in seconds since the epoch, `steady` of any start."""

    def __init__(
        self,
        wall: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._wall = wall
        self._steady = steady

    async def serve(self, _: str, __: ClockAsk) -> ClockSays:
        return ClockSays(self._wall())

    async def compare(self, network: Network, peer: str, *, timeout: float) -> Offset:
        """The best of `SAMPLES`, each within `timeout` seconds. Raises `NetworkError`."""
        best: Offset | None = None
        for _ in range(SAMPLES):
            before, began = self._wall(), self._steady()
            answer = await network.call(peer, CLOCK, ClockAsk(), timeout=timeout)
            rtt = self._steady() - began
            # The peer answers at once: its times of receipt and of sending are one.
            offset = Offset(answer.now - (before + rtt / 2), rtt / 2)
            if best is None or offset.uncertainty < best.uncertainty:
                best = offset
        assert best is not None
        return best
