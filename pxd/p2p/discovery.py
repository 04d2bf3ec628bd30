"""Keeps trying, for ever, to be connected with every member that this node has heard of."""

import logging
import random

import trio

from pxd.p2p.backoff import Backoff
from pxd.p2p.dialer import REFUSED, Dialer
from pxd.p2p.sessions import Sessions

log = logging.getLogger("pxd.p2p")

FIRST_DELAY = 0.5
LONGEST_DELAY = 30.0
REFUSED_DELAY = 60.0
"""Seconds. A peer that refused us will do so again until a person changes something."""

SPREAD = 0.01
"""Seconds per known peer over which attempts to all of them at once are drawn out."""

TARGETS = 1024


class _Target:
    """A peer to be connected with. `poke` is set when there is reason to try at once, and
    `afresh` when failures so far say nothing about the attempts to come."""

    def __init__(self, peer: str, *, wanted: bool) -> None:
        self.peer = peer
        self.wanted = wanted
        self.poke = trio.Event()
        self.afresh = False
        self.refused = False
        self.state: str | None = None


class Discovery:
    """One task per peer, in `nursery`."""

    def __init__(
        self,
        nursery: trio.Nursery,
        dialer: Dialer,
        sessions: Sessions,
        rng: random.Random | None = None,
    ) -> None:
        self._nursery = nursery
        self._dialer = dialer
        self._sessions = sessions
        self._rng = rng or random.Random()
        self._targets: dict[str, _Target] = {}
        sessions.on_peer(self._on_peer)

    def seek(self, peer: str, *, wanted: bool = False) -> None:
        """Be connected with `peer` from now on; try at once unless it has refused this node.

        `wanted` by a person: not reaching it is worth a warning.
        """
        target = self._targets.get(peer)
        if target:
            if not target.refused:
                target.poke.set()
        elif len(self._targets) < TARGETS:
            target = self._targets[peer] = _Target(peer, wanted=wanted)
            self._nursery.start_soon(self._pursue, target)

    def try_again(self) -> None:
        """This machine has moved: all that could not be reached may be within reach now."""
        for target in self._targets.values():
            target.afresh = True
            target.refused = False
            target.poke.set()

    def _on_peer(self, peer: str, up: bool) -> None:
        if peer in self._targets:
            self._targets[peer].poke.set()
        elif up:
            self.seek(peer)

    async def _pursue(self, target: _Target) -> None:
        backoff = Backoff(FIRST_DELAY, LONGEST_DELAY, self._rng)
        while True:
            target.poke = trio.Event()
            if target.afresh:
                target.afresh = False
                backoff.reset()
                # Not hundreds of dials in one moment.
                await trio.sleep(self._rng.uniform(0, SPREAD * len(self._targets)))
            session = self._sessions.get(target.peer)
            if session:
                target.refused = False
                self._report(target, "")
                backoff.reset()
                await session.ended.wait()
                # Both ends see the loss at once; apart from each other they dial once, not twice.
                await trio.sleep(self._rng.uniform(0, FIRST_DELAY))
                continue
            failure = await self._dialer.dial(target.peer)
            if failure is None:
                continue
            target.refused = failure.reason in REFUSED
            delay = backoff.next()
            if target.refused:
                # The dialer has told why, and what to do.
                target.state = str(failure)
                delay = REFUSED_DELAY * self._rng.uniform(1.0, 1.5)
            else:
                self._report(target, str(failure))
            with trio.move_on_after(delay):
                await target.poke.wait()

    def _report(self, target: _Target, problem: str) -> None:
        """Log only what has changed."""
        if problem == target.state:
            return
        target.state = problem
        if problem:
            level = logging.WARNING if target.wanted else logging.INFO
            log.log(level, "cannot reach %s yet: %s; still trying", target.peer, problem)
        else:
            log.info("connected with %s", target.peer)
