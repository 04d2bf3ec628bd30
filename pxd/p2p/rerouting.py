"""A better way to a peer that is connected already: a cable was plugged in, or it told of one."""

import logging
from collections.abc import Callable, Sequence

import trio

from pxd.p2p.addressbook import AddressBook
from pxd.p2p.host import DialFailed, Host
from pxd.p2p.interfaces import Local
from pxd.p2p.routes import nearness, routes
from pxd.p2p.sessions import Sessions

log = logging.getLogger("pxd.p2p")

DELAYS = (0.0, 2.0, 10.0)
"""Seconds before the attempts: a cable is often there before what is on it answers."""


class Rerouting:
    """Of two peers the one with the lesser id dials, since both prefer what that one dialled."""

    def __init__(
        self,
        own_id: str,
        host: Host,
        sessions: Sessions,
        book: AddressBook,
        locals_: Callable[[], Sequence[Local]],
    ) -> None:
        self._own_id = own_id
        self._host = host
        self._sessions = sessions
        self._book = book
        self._locals = locals_
        self._looking: set[str] = set()
        self._news: set[str] = set()

    async def look(self, peer: str) -> None:
        """Try what is better than the connection in use, at once and a few times more."""
        if self._own_id > peer:
            return
        self._news.add(peer)
        if peer in self._looking:
            return
        self._looking.add(peer)
        try:
            while peer in self._news:
                self._news.discard(peer)
                for delay in DELAYS:
                    await trio.sleep(delay)
                    if peer in self._news or not await self._improve(peer):
                        break
        finally:
            self._looking.discard(peer)

    async def _improve(self, peer: str) -> bool:
        """Returns whether there is a better way that could not be taken."""
        session, among = self._sessions.get(peer), self._locals()
        if session is None or not session.alive:
            return False
        now = nearness(session.connection.host, among)
        failed = False
        for address in routes(self._book.addresses(peer), among):
            there = nearness(address.host, among)
            if now is None or there is None or there >= now:
                break
            try:
                await self._host.dial(address)
            except DialFailed as error:
                log.debug("no better way to %s at %s: %s", peer, address.host, error)
                failed = True
            else:
                log.info("a better way to %s: %s", peer, address.host)
                return False
        return failed
