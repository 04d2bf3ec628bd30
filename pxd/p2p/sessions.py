"""Which peers are in: one session per peer and life of its process, over its connections."""

import logging
from collections.abc import Collection

import trio

from pxd.p2p.host import Connection
from pxd.p2p.network import PeerHandler, PeerUnreachable
from pxd.p2p.rpc import RpcClient

log = logging.getLogger("pxd.p2p")

SURPLUS_GRACE = 10.0
SURPLUS_POLL = 1.0
CONNECTIONS_PER_PEER = 4
CHECK_TIMEOUT = 4.0
"""Seconds within which a connection must show that it works once there is reason to doubt it; until
then another one is used. Long enough for a network that loses every other packet."""


class Session:
    """A peer that is in. `ended` is set when its last connection is gone, or when it restarted.

    `shaken` is set, and replaced, when any connection broke: other ways to the peer may be, too.
    """

    def __init__(self, peer: str, instance: bytes, own_id: str) -> None:
        self.peer = peer
        self.ended = trio.Event()
        self.shaken = trio.Event()
        self.instance = instance
        self._own_id = own_id
        self._clients: dict[Connection, RpcClient] = {}
        self._direct_added = trio.Event()

    @property
    def connections(self) -> tuple[Connection, ...]:
        """Oldest first."""
        return tuple(self._clients)

    @property
    def connection(self) -> Connection:
        """The one to use. Both ends choose the same: a direct one before one through a relay, and
        of these that which the lesser peer id dialled.

        One that may be dead is left out as long as there is another. Raises `PeerUnreachable`
        when all have ended.
        """
        by_the_lesser = self._own_id < self.peer
        usable = [c for c in self._clients if not c.muxer.closed.is_set()]
        usable = [c for c in usable if not c.relay] or usable
        if not usable:
            raise PeerUnreachable(f"lost the connection to {self.peer}")
        sure = [c for c in usable if not c.muxer.doubted] or usable
        return ([c for c in sure if c.dialled == by_the_lesser] or sure)[-1]

    @property
    def alive(self) -> bool:
        """False for the moment between the loss of the last connection and `ended`."""
        return any(not c.muxer.closed.is_set() for c in self._clients)

    @property
    def direct(self) -> bool:
        """Whether there is a connection that needs no relay."""
        return any(not c.relay and not c.muxer.closed.is_set() for c in self._clients)

    async def wait_direct(self) -> None:
        """Return when there is one; never if the session ends without."""
        while not self.direct:
            await self._direct_added.wait()

    @property
    def client(self) -> RpcClient:
        return self._clients[self.connection]

    def add(self, connection: Connection, client: RpcClient) -> None:
        self._clients[connection] = client
        if not connection.relay:
            self._direct_added.set()
            self._direct_added = trio.Event()

    def remove(self, connection: Connection) -> None:
        self._clients.pop(connection, None)


class Sessions:
    """Everybody who is in, and who wants to hear of it."""

    def __init__(self, own_id: str) -> None:
        self.own_id = own_id
        self._sessions: dict[str, Session] = {}
        self._handlers: list[PeerHandler] = []

    def peers(self) -> frozenset[str]:
        return frozenset(self._sessions)

    def get(self, peer: str) -> Session | None:
        return self._sessions.get(peer)

    def on_peer(self, handler: PeerHandler) -> None:
        self._handlers.append(handler)

    def add(self, connection: Connection, client: RpcClient) -> Session:
        """Take in an admitted connection. One of a new life of the peer ends those of the old."""
        session = self._sessions.get(connection.peer)
        if session and session.instance != connection.instance:
            for old in session.connections:
                old.muxer.abort("the peer restarted")
            self._end(session)
            session = None
        if session is None:
            session = Session(connection.peer, connection.instance, self.own_id)
            session.add(connection, client)
            self._sessions[session.peer] = session
            self._notify(session.peer, True)
        else:
            session.add(connection, client)
            if len(session.connections) > CONNECTIONS_PER_PEER:
                session.connections[0].muxer.abort("too many connections")
        return session

    def remove(self, session: Session, connection: Connection) -> None:
        session.remove(connection)
        if not connection.muxer.orderly:
            session.shaken.set()
            session.shaken = trio.Event()
        if not session.connections:
            self._end(session)

    async def check(self, session: Session, new: Connection) -> None:
        """Why did the peer connect again? Perhaps it knows that what there was is broken."""
        async with trio.open_nursery() as nursery:
            for connection in session.connections:
                if connection is not new:
                    nursery.start_soon(connection.muxer.check, CHECK_TIMEOUT)

    async def check_all(self, lost: Collection[str]) -> None:
        """After the network changed: drop connections from addresses that are `lost`, and those
        that do not answer."""
        async with trio.open_nursery() as nursery:
            for session in tuple(self._sessions.values()):
                for connection in session.connections:
                    if connection.local_host in lost:
                        connection.muxer.abort(f"{connection.local_host} is no longer this node's")
                    else:
                        nursery.start_soon(connection.muxer.check, CHECK_TIMEOUT)

    async def close_surplus(self, session: Session) -> None:
        """Two peers that dialled each other at once, or got rid of a relay, keep one connection.

        Only the lesser peer id closes, only after both have long used the same one, and only what
        nothing runs on any more: calls come to their end where they began.
        """
        if self.own_id > session.peer:
            return
        await trio.sleep(SURPLUS_GRACE)
        while session.alive and len(session.connections) > 1:
            chosen = session.connection
            for connection in session.connections:
                if connection is not chosen and not connection.in_use:
                    await connection.muxer.close("there is another connection")
            await trio.sleep(SURPLUS_POLL)

    def _end(self, session: Session) -> None:
        if self._sessions.get(session.peer) is session:
            session.ended.set()
            del self._sessions[session.peer]
            self._notify(session.peer, False)

    def _notify(self, peer: str, up: bool) -> None:
        for handler in self._handlers:
            try:
                handler(peer, up)
            except Exception:
                log.exception("a handler of peer changes failed")
