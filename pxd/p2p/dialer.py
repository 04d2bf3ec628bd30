"""Making connections: one attempt per peer at a time, over all its addresses, shared by all.

Where none of them leads there, or not soon, the relays that this node is connected to are asked.
"""

import logging
from collections.abc import Callable, Sequence

import trio

from pxd.p2p.addressbook import AddressBook
from pxd.p2p.addresses import Address
from pxd.p2p.circuit import Circuits
from pxd.p2p.host import Connection, DialFailed, Host
from pxd.p2p.interfaces import Local
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.refusals import Refusals
from pxd.p2p.routes import routes
from pxd.p2p.sessions import Session, Sessions

log = logging.getLogger("pxd.p2p")

STAGGER = 0.3
"""Seconds before the next address is tried beside one that has not answered yet (RFC 8305)."""

RELAY_AFTER = 1.0
"""Seconds that the peer's own addresses have before a relay is asked beside them."""

FAILURE_CACHED = 1.0
ATTEMPTS_KEPT = 1024
REFUSED = ("wrong-key", "old-key", "version", "banned")

_FRESH_TICKET = (
    "get a fresh ticket with `pxd ticket` there and start this node with "
    "`pxd start --join TICKET`; `pxd doctor` looks closer"
)
_REMEDIES = {
    "wrong-key": _FRESH_TICKET,
    "old-key": _FRESH_TICKET,
    "version": "run the same release of pxd on both machines",
    "banned": "any member can let it back in with `pxd kick --undo`",
}


class _Attempt:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.failure: DialFailed | None = None
        self.failed_at = float("-inf")


class Dialer:
    """Dials run in `nursery`, so that giving up waiting for one does not end it for others.

    `locals_()` are this machine's addresses now; `relays(peer)` are connections with members that
    may lead to the peer, the best first; `nobody_there(peer)` is told when nobody listens at an
    address of the peer.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        host: Host,
        sessions: Sessions,
        book: AddressBook,
        refusals: Refusals,
        circuits: Circuits,
        relays: Callable[[str], Sequence[Connection]],
        locals_: Callable[[], Sequence[Local]],
        nobody_there: Callable[[str], None],
    ) -> None:
        self._nursery = nursery
        self._host = host
        self._sessions = sessions
        self._book = book
        self._refusals = refusals
        self._circuits = circuits
        self._relays = relays
        self._locals = locals_
        self._nobody_there = nobody_there
        self._attempts: dict[str, _Attempt] = {}

    async def reach(self, peer: str) -> Session:
        """The session with `peer`, dialled if need be. Raises `PeerUnreachable`.

        A failure is remembered for `FAILURE_CACHED` seconds.
        """
        session = self._sessions.get(peer)
        if session and session.alive:
            return session
        if session:
            await session.ended.wait()
        failure = await self.dial(peer, cached=FAILURE_CACHED)
        session = self._sessions.get(peer)
        if session is None:
            raise PeerUnreachable(f"cannot reach {peer}: {failure or 'it went away'}")
        return session

    async def dial(self, peer: str, *, cached: float = 0.0) -> DialFailed | None:
        """Try to connect to `peer`; returns why that failed, or None when it is in."""
        attempt = self._attempts.get(peer)
        if attempt and attempt.done.is_set():
            if trio.current_time() < attempt.failed_at + cached:
                return attempt.failure
            attempt = None
        if attempt is None:
            self._forget_old()
            attempt = self._attempts[peer] = _Attempt()
            self._nursery.start_soon(self._run, attempt, peer)
        await attempt.done.wait()
        return attempt.failure

    def _forget_old(self) -> None:
        if len(self._attempts) >= ATTEMPTS_KEPT:
            done = [peer for peer, attempt in self._attempts.items() if attempt.done.is_set()]
            for peer in done:
                del self._attempts[peer]

    async def _run(self, attempt: _Attempt, peer: str) -> None:
        try:
            attempt.failure = await self._race(peer)
            attempt.failed_at = trio.current_time()
        finally:
            attempt.done.set()
            if attempt.failure is None:
                self._attempts.pop(peer, None)

    async def dial_directly(self, peer: str) -> None:
        """Try all addresses of `peer`, whether or not there is a connection through a relay."""
        failures: list[DialFailed] = []
        async with trio.open_nursery() as nursery:
            await self._try_addresses(peer, failures, nursery.cancel_scope)

    async def _race(self, peer: str) -> DialFailed | None:
        if peer in self._host.banned:
            return DialFailed("banned", "it was kicked out of the cluster")
        failures: list[DialFailed] = []
        from_relays: list[DialFailed] = []
        tried = trio.Event()

        async def directly() -> None:
            await self._try_addresses(peer, failures, nursery.cancel_scope)
            tried.set()

        async with trio.open_nursery() as nursery:
            nursery.start_soon(directly)
            with trio.move_on_after(RELAY_AFTER):
                await tried.wait()
            if not _refusals(failures):
                await self._try_relays(peer, from_relays, nursery.cancel_scope)
        if peer in self._sessions.peers():
            return None
        known = "it went away again" if self._book.addresses(peer) else "no address of it is known"
        failures += from_relays or [DialFailed("unreachable", known)]
        return (_refusals(failures) or failures)[0]

    async def _try_addresses(
        self, peer: str, failures: list[DialFailed], success: trio.CancelScope
    ) -> None:
        """Cancels `success` when the peer is in; returns when all have failed."""

        async def try_address(address: Address, failed: trio.Event) -> None:
            try:
                await self._host.dial(address)
            except DialFailed as error:
                where = f"{address.host}:{address.port}"
                self._note(where, peer, error)
                failures.append(DialFailed(error.reason, f"{where}: {error}"))
                failed.set()
                if error.reason == "nobody":
                    self._nobody_there(peer)
            else:
                self._book.worked(address)
                success.cancel()

        async with trio.open_nursery() as nursery:
            for address in routes(self._book.addresses(peer), self._locals()):
                failed = trio.Event()
                nursery.start_soon(try_address, address, failed)
                with trio.move_on_after(STAGGER):
                    await failed.wait()

    async def _try_relays(
        self, peer: str, failures: list[DialFailed], success: trio.CancelScope
    ) -> None:
        for relay in self._relays(peer):
            try:
                await self._circuits.dial(relay, peer)
            except DialFailed as error:
                if error.reason in REFUSED:
                    self._note(f"a node behind the relay {relay.peer}", peer, error)
                failures.append(DialFailed(error.reason, f"the relay {relay.peer}: {error}"))
            else:
                success.cancel()
                return

    def _note(self, where: str, peer: str, failure: DialFailed) -> None:
        if failure.reason in REFUSED:
            remedy = _REMEDIES[failure.reason]
            message = f"refused by {where} (peer {peer}): {failure}; {remedy}"
            self._refusals.warn(where, peer, failure.reason, message)
        else:
            self._refusals.note(where, peer, str(failure))


def _refusals(failures: list[DialFailed]) -> list[DialFailed]:
    return [failure for failure in failures if failure.reason in REFUSED]
