"""Which ways to measure and when: the important ones, seldom, and only while nobody needs them."""

import logging
import random
from collections.abc import Callable, Collection, Mapping

import trio

from pxd.cluster.members import Member
from pxd.cluster.records import MAX_LINKS
from pxd.p2p.bandwidth import Interrupted, Meter
from pxd.p2p.network import NetworkError

log = logging.getLogger("pxd.serving.survey")

FIRST_S = (15.0, 45.0)
MOVED_S = (3.0, 10.0)
AGAIN_S = (480.0, 720.0)
FAILED_S = (45.0, 90.0)
"""Ranges from which waits are drawn, so that nodes do not march: after a peer came, after the way
to it changed, after it was measured, and after that failed, which doubles up to `AGAIN_S`."""

GAP_S = 5.0
"""Between two measurements by this node."""

OLD_SHARE = 0.5
"""How much of a figure stays when there is a new one of the same way."""

LOOK_EVERY_S = 1.0
QUIET_S = 2.0
"""Seconds without any frame before this node counts as idle."""


class _Way:
    def __init__(self, way: str, due: float) -> None:
        self.way = way
        self.due = due
        self.gbs = 0.0
        self.same = False
        self.failures = 0


class Schedule:
    """Pure but for `rng`; times in seconds, bandwidths in GB/s."""

    def __init__(self, rng: random.Random) -> None:
        self._rng = rng
        self._ways: dict[str, _Way] = {}
        self._next_at = float("-inf")

    def follow(self, now: float, ways: Mapping[str, str]) -> None:
        """`ways` are the peers that are connected, each with what names the way to it."""
        for peer in self._ways.keys() - ways.keys():
            del self._ways[peer]
        for peer, way in ways.items():
            known = self._ways.get(peer)
            if known is None:
                self._ways[peer] = _Way(way, now + self._wait(FIRST_S))
            elif known.way != way:
                known.way, known.same, known.failures = way, False, 0
                known.due = min(known.due, now + self._wait(MOVED_S))

    def next(self, now: float, partners: Collection[str], rtts: Mapping[str, float]) -> str | None:
        """Whom to measure now, if anybody: of the `MAX_LINKS` that matter most, partners first."""
        if now < self._next_at:
            return None

        def rank(peer: str) -> tuple[bool, float, str]:
            return peer not in partners, rtts.get(peer, float("inf")), peer

        important = sorted(self._ways, key=rank)[:MAX_LINKS]
        due = [peer for peer in important if self._ways[peer].due <= now]
        return min(due, key=lambda p: (p not in partners, self._ways[p].due, p), default=None)

    def measured(self, now: float, peer: str, gbs: float) -> None:
        self._next_at = now + GAP_S
        if known := self._ways.get(peer):
            known.gbs = OLD_SHARE * known.gbs + (1 - OLD_SHARE) * gbs if known.same else gbs
            known.same, known.failures = True, 0
            known.due = now + self._wait(AGAIN_S)

    def failed(self, now: float, peer: str) -> None:
        """Perhaps it was busy; perhaps it is of a release that cannot be measured."""
        self._next_at = now + GAP_S
        if known := self._ways.get(peer):
            wait = self._wait(FAILED_S) * 2.0 ** min(known.failures, 16)
            known.failures += 1
            known.due = now + min(wait, self._wait(AGAIN_S))

    @property
    def bandwidths(self) -> dict[str, float]:
        """What is known, of peers that are connected."""
        return {peer: known.gbs for peer, known in self._ways.items() if known.gbs > 0}

    def _wait(self, span: tuple[float, float]) -> float:
        return self._rng.uniform(*span)


class Survey:
    """Keeps the schedule while `run` runs. `way_of(peer)` is None without a connection;
    `occupied()` says that this node works for somebody."""

    def __init__(
        self,
        own_id: str,
        members: Callable[[], Mapping[str, Member]],
        way_of: Callable[[str], str | None],
        partners: Callable[[], frozenset[str]],
        occupied: Callable[[], bool],
        meter: Callable[[Callable[[], bool]], Meter],
    ) -> None:
        self._own_id = own_id
        self._members = members
        self._way_of = way_of
        self._partners = partners
        self._occupied = occupied
        self._frame_at = float("-inf")
        self._schedule = Schedule(random.Random())
        self.meter = meter(self.busy)

    def frame_arrived(self) -> None:
        """A frame of a request came, from wherever."""
        self._frame_at = trio.current_time()

    @property
    def frames_come(self) -> bool:
        """Frames of requests came a moment ago."""
        return trio.current_time() < self._frame_at + QUIET_S

    def busy(self) -> bool:
        return self._occupied() or self.frames_come

    def rtts(self) -> dict[str, float]:
        """Round-trip times to all other nodes that are there, as far as they are measured."""
        return {
            peer: member.rtt
            for peer, member in self._members().items()
            if member.live and member.rtt is not None and peer != self._own_id
        }

    def bandwidths(self) -> dict[str, float]:
        """GB/s to peers, as far as they are measured."""
        return self._schedule.bandwidths

    async def run(self) -> None:
        while True:
            await trio.sleep(LOOK_EVERY_S)
            rtts = self.rtts()
            ways = {peer: way for peer in rtts if (way := self._way_of(peer)) is not None}
            self._schedule.follow(trio.current_time(), ways)
            if not self.busy():
                peer = self._schedule.next(trio.current_time(), self._partners(), rtts)
                if peer is not None:
                    await self._measure(peer)

    async def _measure(self, peer: str) -> None:
        try:
            gbs = await self.meter.measure(peer)
        except (NetworkError, Interrupted) as error:
            log.debug("did not measure the way to %s: %s", peer, error)
            self._schedule.failed(trio.current_time(), peer)
        else:
            log.debug("%.3g GB/s to %s", gbs, peer)
            self._schedule.measured(trio.current_time(), peer, gbs)
