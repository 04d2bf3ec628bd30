"""Making connections: one attempt per peer at a time, over all its addresses, shared by all."""

import logging
from collections.abc import Callable, Sequence

import trio

from pxd.p2p.addressbook import AddressBook
from pxd.p2p.addresses import Address
from pxd.p2p.host import DialFailed, Host
from pxd.p2p.interfaces import Local
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.refusals import Refusals
from pxd.p2p.routes import routes
from pxd.p2p.sessions import Session, Sessions

log = logging.getLogger("pxd.p2p")

STAGGER = 0.3
"""Seconds before the next address is tried beside one that has not answered yet (RFC 8305)."""

FAILURE_CACHED = 1.0
ATTEMPTS_KEPT = 1024
REFUSED = ("wrong-key", "old-key", "version", "banned")

_FRESH_TICKET = (
    "get a fresh ticket with `pxd ticket` there and start this node with `pxd start --join TICKET`"
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

    `locals_()` are this machine's addresses now.
    """

    def __init__(
        self,
        nursery: trio.Nursery,
        host: Host,
        sessions: Sessions,
        book: AddressBook,
        refusals: Refusals,
        locals_: Callable[[], Sequence[Local]],
    ) -> None:
        self._nursery = nursery
        self._host = host
        self._sessions = sessions
        self._book = book
        self._refusals = refusals
        self._locals = locals_
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
            addresses = routes(self._book.addresses(peer), self._locals())
            attempt.failure = await self._race(peer, addresses)
            attempt.failed_at = trio.current_time()
        finally:
            attempt.done.set()
            if attempt.failure is None:
                self._attempts.pop(peer, None)

    async def _race(self, peer: str, addresses: Sequence[Address]) -> DialFailed | None:
        if peer in self._host.banned:
            return DialFailed("banned", "it was kicked out of the cluster")
        if not addresses:
            return DialFailed("unreachable", "no address of it is known")
        failures: list[DialFailed] = []

        async def try_address(address: Address, failed: trio.Event) -> None:
            try:
                await self._host.dial(address)
            except DialFailed as error:
                self._note(address, error)
                where = f"{address.host}:{address.port}"
                failures.append(DialFailed(error.reason, f"{where}: {error}"))
                failed.set()
            else:
                self._book.worked(address)
                nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for address in addresses:
                failed = trio.Event()
                nursery.start_soon(try_address, address, failed)
                with trio.move_on_after(STAGGER):
                    await failed.wait()
        if peer in self._sessions.peers():
            return None
        refused = [failure for failure in failures if failure.reason in REFUSED]
        return (refused or failures or [DialFailed("unreachable", "it went away again")])[0]

    def _note(self, address: Address, failure: DialFailed) -> None:
        where = f"{address.host}:{address.port}"
        if failure.reason in REFUSED:
            remedy = _REMEDIES[failure.reason]
            message = f"refused by {where} (peer {address.peer}): {failure}; {remedy}"
            self._refusals.warn(where, address.peer, failure.reason, message)
        else:
            self._refusals.note(where, address.peer, str(failure))
