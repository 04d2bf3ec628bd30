"""From a relayed connection to a direct one: dialling again, and hole punching through NAT.

Hole punching follows https://github.com/libp2p/specs/blob/master/relay/DCUtR.md, with its protocol
id and messages: over the relayed connection both ends tell each other where they will call from,
and connect at the same moment, so that each router takes the other's call for an answer. One thing
is different: each round calls from a fresh port instead of the listen port. A router that keeps
port numbers, which is what TCP hole punching rests on, keeps that one more surely, because no other
machine behind it uses the same; and nobody else can be let in to listen on this node's port.

Behind a router that gives every connection another port this cannot work. The relay goes on then.
"""

import logging
import math
import random
import socket
from collections.abc import AsyncIterator, Awaitable, Callable, Sequence
from contextlib import asynccontextmanager

import trio
from libp2p.relay.circuit_v2.pb.dcutr_pb2 import HolePunch

from pxd.p2p import observed
from pxd.p2p.backoff import Backoff
from pxd.p2p.circuit import Malformed, read_message, write_message
from pxd.p2p.dialer import Dialer
from pxd.p2p.host import Connection, DialFailed, Host, Route
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.observed import Endpoint
from pxd.p2p.reach import may_dial
from pxd.p2p.secure import TcpStream, Transport
from pxd.p2p.sessions import Session, Sessions

log = logging.getLogger("pxd.p2p")

PROTOCOL = "/libp2p/dcutr"

ROUNDS = 3
ROUND_TIMEOUT = 5.0
MESSAGE_TIMEOUT = 5.0
AGAIN_AFTER = 0.2
"""Seconds after which a call that was turned away within a round is repeated."""

REST = 5.0
"""Seconds between two attempts that the same peer can ask for."""

FIRST_DELAY = 15.0
LONGEST_DELAY = 600.0
"""Seconds between attempts to get rid of a relay; doubling, for as long as it is needed."""

OBSERVERS = 4
ENDPOINTS = 4

_STAYS = (
    "no direct connection with %s can be made, neither to an address of it nor by hole punching; "
    "%s passes everything on, which costs speed. To do without, let the listen port of one of the "
    "two nodes through"
)


class Upgrades:
    """Gives relayed connections up for direct ones where that is possible.

    Connections that come of it are served in `nursery`.
    """

    def __init__(
        self, nursery: trio.Nursery, host: Host, sessions: Sessions, dialer: Dialer
    ) -> None:
        self._nursery = nursery
        self._host = host
        self._sessions = sessions
        self._dialer = dialer
        self._served: dict[str, float] = {}

    async def run(self, session: Session, connection: Connection) -> None:
        """Try until there is a direct connection to the peer of this relayed one."""
        backoff = Backoff(FIRST_DELAY, LONGEST_DELAY, random.Random())
        # Who dialled has just tried all addresses; hole punching is begun by the other end.
        delay = FIRST_DELAY if connection.dialled else 0.0
        said = False
        while True:
            with trio.move_on_after(delay):
                await session.wait_direct()
            if not session.direct:
                await self._dialer.dial_directly(session.peer)
            if not session.direct and not connection.dialled:
                await self._initiate(session, connection)
            if session.direct:
                log.info("connected with %s without %s", connection.peer, connection.address)
                return
            if not said:
                said = True
                log.info(_STAYS, connection.peer, connection.address)
            delay = backoff.next()

    async def _initiate(self, session: Session, connection: Connection) -> None:
        """DCUtR as the end that was called. That end listens once the way is open."""
        hosts = await self._own_hosts(connection)
        try:
            stream = await connection.open_stream(PROTOCOL)
        except StreamClosed as error:
            log.debug("%s does no hole punching: %s", connection.peer, error)
            return
        try:
            for _ in range(ROUNDS):
                async with _reserved() as port:
                    began = trio.current_time()
                    with trio.fail_after(MESSAGE_TIMEOUT):
                        await write_message(stream, _connect(hosts, port))
                        theirs = await _read_connect(stream)
                        rtt = trio.current_time() - began
                        await write_message(stream, HolePunch(type=HolePunch.SYNC))
                    if not hosts or not theirs:
                        break
                    await trio.sleep(rtt / 2)
                    await self._round(session, port, theirs, self._listen)
                if session.direct:
                    break
            stream.finish()
        except (StreamClosed, trio.TooSlowError, OSError) as error:
            log.debug("hole punching with %s broke off: %s", connection.peer, error)
        finally:
            stream.reset()

    async def serve(self, connection: Connection, stream: YamuxStream) -> None:
        """Serve `PROTOCOL`, as the end that asked for the circuit. That end dials."""
        session = self._sessions.get(connection.peer)
        if not connection.relay or not connection.dialled or not self._due(connection.peer):
            raise Malformed("no hole punching is due on this connection")
        self._served[connection.peer] = math.inf
        try:
            hosts = await self._own_hosts(connection)
            for _ in range(ROUNDS):
                if session is None or session.direct:
                    return
                async with _reserved() as port:
                    with trio.fail_after(MESSAGE_TIMEOUT + ROUND_TIMEOUT):
                        theirs = await _read_connect(stream)
                    with trio.fail_after(MESSAGE_TIMEOUT):
                        await write_message(stream, _connect(hosts, port))
                        message = await read_message(stream, HolePunch)
                    if message.type != HolePunch.SYNC:
                        raise Malformed("no SYNC where one is due")
                    await self._round(session, port, theirs, self._dial)
        finally:
            self._served[connection.peer] = trio.current_time()

    def _due(self, peer: str) -> bool:
        """A peer that wants calls to addresses of its choice gets them seldom."""
        now = trio.current_time()
        self._served = {each: at for each, at in self._served.items() if now < at + REST}
        return peer not in self._served

    async def _own_hosts(self, connection: Connection) -> list[str]:
        """Where this node seems to be: told by the relay, and by others that it is connected to."""
        asked = [session.connection for session in self._direct_sessions(connection.relay)]
        found: dict[str, None] = {}

        async def ask(other: Connection) -> None:
            endpoint = await observed.ask(other)
            if endpoint and may_dial(endpoint[0], loopback=False):
                found[endpoint[0]] = None

        async with trio.open_nursery() as nursery:
            for other in asked:
                nursery.start_soon(ask, other)
        return list(found)

    def _direct_sessions(self, first: str) -> list[Session]:
        peers = sorted(self._sessions.peers(), key=lambda peer: (peer != first, peer))
        sessions = [self._sessions.get(peer) for peer in peers]
        return [session for session in sessions if session and session.direct][:OBSERVERS]

    async def _round(
        self,
        session: Session,
        port: int,
        endpoints: Sequence[Endpoint],
        use: Callable[[Session, trio.SocketStream, Route], Awaitable[None]],
    ) -> None:
        """Call all `endpoints` from `port`, until there is a direct connection."""

        async def call(endpoint: Endpoint) -> None:
            stream = await _call(port, endpoint)
            host, there = endpoint
            await use(session, stream, Route(f"{host}:{there}", host, punched=True))

        with trio.move_on_after(ROUND_TIMEOUT):
            async with trio.open_nursery() as nursery:
                for endpoint in endpoints:
                    nursery.start_soon(call, endpoint)
                await session.wait_direct()
                nursery.cancel_scope.cancel()

    async def _dial(self, session: Session, stream: trio.SocketStream, route: Route) -> None:
        async def opened() -> Transport:
            return TcpStream(stream)

        try:
            await self._host.dial_over(opened, session.peer, route)
        except DialFailed as error:
            log.debug("whoever answers at %s is not %s: %s", route.address, session.peer, error)

    async def _listen(self, session: Session, stream: trio.SocketStream, route: Route) -> None:
        self._nursery.start_soon(self._host.accept, TcpStream(stream), route, session.peer)


def _connect(hosts: Sequence[str], port: int) -> HolePunch:
    endpoints = [observed.encode_endpoint((host, port)) for host in hosts[:ENDPOINTS]]
    return HolePunch(type=HolePunch.CONNECT, ObsAddrs=endpoints)


async def _read_connect(stream: YamuxStream) -> list[Endpoint]:
    """Where the other end will call from, as far as this node would dial there."""
    message = await read_message(stream, HolePunch)
    if message.type != HolePunch.CONNECT:
        raise Malformed("no CONNECT where one is due")
    return endpoints_in(message)


def endpoints_in(message: HolePunch) -> list[Endpoint]:
    """At most `ENDPOINTS`; what makes no sense is left out."""
    found = []
    for data in message.ObsAddrs[:ENDPOINTS]:
        try:
            endpoint = observed.decode_endpoint(data)
        except ValueError:
            continue
        if may_dial(endpoint[0], loopback=False):
            found.append(endpoint)
    return found


def _socket(family: int) -> trio.socket.SocketType:
    made = trio.socket.socket(family, socket.SOCK_STREAM)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if hasattr(socket, "SO_REUSEPORT"):
        made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
    return made


@asynccontextmanager
async def _reserved() -> AsyncIterator[int]:
    """A port that nobody else gets; raises OSError when there is none."""
    with _socket(socket.AF_INET) as holder:
        await holder.bind(("", 0))
        yield holder.getsockname()[1]


async def _call(port: int, endpoint: Endpoint) -> trio.SocketStream:
    """Connect from `port`, again and again: one end is always a little early."""
    family = socket.AF_INET6 if ":" in endpoint[0] else socket.AF_INET
    while True:
        made = _socket(family)
        try:
            await made.bind(("", port))
            await made.connect(endpoint)
            return trio.SocketStream(made)
        except OSError as error:
            made.close()
            log.debug("calling %s:%d from port %d: %s", *endpoint, port, error)
            await trio.sleep(AGAIN_AFTER)
        except BaseException:
            made.close()
            raise
