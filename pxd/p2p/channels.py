"""Data channels: one per direction and peer, made when first used, closed when the peer is gone.

A channel is a direct TLS connection to a port that the peer names in a call, pinned to the
certificates exchanged in that call; where none can be made, as through a relay, a stream of the
libp2p connection.
"""

import logging
import ssl
from collections.abc import Callable, Sequence
from typing import Annotated

import msgspec
import trio

from pxd.p2p.framestreams import FrameStream, Libp2pFrames
from pxd.p2p.host import Connection
from pxd.p2p.inbox import FrameInbox
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.network import CallFailed, Method, NetworkError, PeerUnreachable
from pxd.p2p.outbox import FrameOutbox
from pxd.p2p.pending import PendingConnections
from pxd.p2p.services import decode_response, encode_message
from pxd.p2p.sessions import Session, Sessions
from pxd.p2p.tls import CERTIFICATE_LIMIT, Certificate, TlsStream, owner
from pxd.wire import Buffer

log = logging.getLogger("pxd.p2p")

PROTOCOL = "/pxd/frames/1"
OFFER_TIMEOUT = 5.0
CONNECT_TIMEOUT = 3.0


class Offer(msgspec.Struct, frozen=True):
    """The certificate (DER) that this side will show on the data port of the other."""

    certificate: Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_LIMIT)]


class DataPort(msgspec.Struct, frozen=True):
    """Where the other side may connect to, and the certificate (DER) it will see there."""

    certificate: Annotated[bytes, msgspec.Meta(max_length=CERTIFICATE_LIMIT)]
    port: Annotated[int, msgspec.Meta(ge=0, le=65535)]


OFFER = Method("pxd.channel.offer", Offer, DataPort)


class DataChannels:
    """Works while `run` runs. `hosts_of(peer)` names hosts to try besides the connection's own."""

    def __init__(
        self,
        sessions: Sessions,
        inbox: FrameInbox,
        hosts_of: Callable[[str], Sequence[str]],
        *,
        direct: bool = True,
    ) -> None:
        self._sessions = sessions
        self._inbox = inbox
        self._outbox = FrameOutbox(self._open)
        self._hosts_of = hosts_of
        self._direct = direct
        self._port = 0
        self._certificate = Certificate(sessions.own_id)
        self._trusted: dict[bytes, Session] = {}
        self._context: ssl.SSLContext | None = None
        self._pending = PendingConnections()
        self._nursery: trio.Nursery | None = None

    async def run(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Accept channels on `listeners`, all on one port; none means that all use libp2p."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            if listeners:
                self._port = listeners[0].socket.getsockname()[1]
            task_status.started()
            try:
                if listeners:
                    await trio.serve_listeners(self._accept, listeners, handler_nursery=nursery)
                await trio.sleep_forever()
            finally:
                self._nursery = None

    @property
    def port(self) -> int:
        """Where direct channels are accepted; 0 for nowhere."""
        return self._port

    async def send(self, session: Session, header: bytes, body: Buffer) -> None:
        if self._nursery is None:
            raise PeerUnreachable("this node is stopping")
        await self._outbox.send(self._nursery, session, header, body)

    async def on_offer(self, peer: str, offer: Offer) -> DataPort:
        """Serve `OFFER`: from now on the peer may connect with that certificate."""
        session = self._sessions.get(peer)
        if session is None:
            raise CallFailed("unknown-peer", "this connection is gone")
        trusted = {
            der: other
            for der, other in self._trusted.items()
            if other is not session and not other.ended.is_set()
        }
        trusted[offer.certificate] = session
        try:
            _check_owner(offer.certificate, peer)
            self._context = self._certificate.context(list(trusted), server=True)
        except ssl.SSLError as error:
            raise CallFailed("bad-request", str(error)) from error
        self._trusted = trusted
        return DataPort(self._certificate.der, self._port)

    async def on_stream(self, connection: Connection, stream: YamuxStream) -> None:
        """Serve `PROTOCOL`, the way where no direct connection can be made."""
        session = self._sessions.get(connection.peer)
        if session is None or self._nursery is None:
            return
        done = trio.Event()
        # Not in the connection's own task: a handler is not cancelled because its peer is gone.
        self._nursery.start_soon(self._receive, session, Libp2pFrames(connection, stream), done)
        await done.wait()

    async def _receive(self, session: Session, stream: FrameStream, done: trio.Event) -> None:
        await self._inbox.receive(session, stream)
        done.set()

    async def _accept(self, transport: trio.SocketStream) -> None:
        session = None
        try:
            host = transport.socket.getpeername()[0]
            with self._pending.admit(host, within=CONNECT_TIMEOUT):
                if self._context is None:
                    raise ssl.SSLError("nobody is expected here")
                stream = TlsStream(transport, self._context, server=True)
                session = self._trusted.get(await stream.handshake())
        except (OSError, StreamClosed) as error:
            log.debug("refused a data channel: %s", error)
        if session is None or session.ended.is_set():
            await trio.aclose_forcefully(transport)
        else:
            await self._inbox.receive(session, stream)

    async def _open(self, session: Session) -> FrameStream:
        route = session.connection.route
        # Where one port cannot be reached, or only by hole punching, the one beside it cannot.
        if self._direct and not route.relay and not route.punched:
            try:
                return await self._open_direct(session)
            except (NetworkError, OSError, StreamClosed) as error:
                if not session.alive:
                    raise PeerUnreachable(f"lost the connection to {session.peer}") from error
                log.warning(
                    "no direct data channel to %s (%s); its frames take the slower libp2p "
                    "connection. Let its data port, by default the one after its listen port, "
                    "through the firewall",
                    session.peer,
                    error,
                )
        connection = session.connection
        return Libp2pFrames(connection, await connection.open_stream(PROTOCOL))

    async def _open_direct(self, session: Session) -> FrameStream:
        payload = encode_message(Offer(self._certificate.der))
        answer = await session.client.call(OFFER.name, payload, OFFER_TIMEOUT)
        there = decode_response(OFFER, answer)
        if not there.port:
            raise PeerUnreachable("the peer has no data port")
        _check_owner(there.certificate, session.peer)
        context = self._certificate.context([there.certificate], server=False)
        failure: Exception = PeerUnreachable("the peer has no known address")
        for host in dict.fromkeys((session.connection.host, *self._hosts_of(session.peer))):
            try:
                with trio.fail_after(CONNECT_TIMEOUT):
                    return await _connect(host, there, context)
            except (OSError, ValueError, StreamClosed) as error:
                # A host name that cannot be is a ValueError.
                failure = PeerUnreachable(str(error)) if isinstance(error, ValueError) else error
            except trio.TooSlowError:
                failure = PeerUnreachable(f"no answer from {host} port {there.port}")
        raise failure


def _check_owner(certificate: bytes, peer: str) -> None:
    """Raises `ssl.SSLError` unless `peer` is whom the certificate names: nobody is to pass off
    another one's as its own, whose frames would then count as its."""
    try:
        if owner(certificate) != peer:
            raise ssl.SSLError("another peer's certificate")
    except ValueError as error:
        raise ssl.SSLError(str(error)) from error


async def _connect(host: str, there: DataPort, context: ssl.SSLContext) -> FrameStream:
    transport = await trio.open_tcp_stream(host, there.port)
    try:
        stream = TlsStream(transport, context, server=False)
        if await stream.handshake() != there.certificate:
            raise ssl.SSLError("another certificate than agreed")
        return stream
    except BaseException:
        await trio.aclose_forcefully(transport)
        raise
