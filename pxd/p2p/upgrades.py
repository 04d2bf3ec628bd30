"""A better way to a peer that is connected already: a cable was plugged in, or it told of one."""

import logging
from collections.abc import Callable, Sequence

from pxd.p2p.addressbook import AddressBook
from pxd.p2p.host import DialFailed, Host
from pxd.p2p.interfaces import Local
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.routes import nearness, routes
from pxd.p2p.sessions import Session, Sessions

log = logging.getLogger("pxd.p2p")


class Upgrades:
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
        self._busy: set[str] = set()

    async def look(self, peers: Sequence[str]) -> None:
        """Try what is better than the connection in use, peer by peer; one attempt each."""
        for peer in peers:
            session = self._sessions.get(peer)
            if session and self._own_id < peer and peer not in self._busy:
                self._busy.add(peer)
                try:
                    await self._improve(session)
                finally:
                    self._busy.discard(peer)

    async def _improve(self, session: Session) -> None:
        among = self._locals()
        try:
            now = nearness(session.connection.host, among)
        except PeerUnreachable:
            return
        for address in routes(self._book.addresses(session.peer), among):
            there = nearness(address.host, among)
            if now is None or there is None or there >= now:
                return
            try:
                await self._host.dial(address)
            except DialFailed as error:
                log.debug("no better way to %s at %s: %s", session.peer, address.host, error)
            else:
                log.info("a better way to %s: %s", session.peer, address.host)
                return
