"""A libp2p host for members of one cluster: it listens, dials, and lets nobody in without the key.

Nothing a stranger does costs more than a bounded number of sockets for a bounded time, and the only
protocol it is offered is the key proof. Admission belongs to the connection, not to the peer id.
"""

import logging
from collections.abc import Awaitable, Callable, Mapping
from functools import partial
from typing import Literal, NamedTuple, Protocol
from weakref import WeakSet

import trio
from libp2p.protocol_muxer.exceptions import MultiselectClientError, MultiselectError
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey

from pxd.p2p import keyproof
from pxd.p2p.addresses import Address, host_in
from pxd.p2p.keyproof import KeyProof, ProofFailed
from pxd.p2p.muxer import WINDOW, StreamClosed, Yamux, YamuxStream
from pxd.p2p.penalties import Penalties
from pxd.p2p.pending import PendingConnections
from pxd.p2p.refusals import Refusals
from pxd.p2p.secure import Identity, NoiseConnection, TcpStream, Transport, answer, select

log = logging.getLogger("pxd.p2p")

ADMISSION_TIMEOUT = 5.0
RELAYED_ADMISSION_TIMEOUT = 15.0
"""Admission takes about 14 round trips; through a relay each of them is two."""

STREAM_TIMEOUT = 5.0
STREAMS_PER_MEMBER = 32
STREAMS_PER_STRANGER = 2
BYTES_PER_STRANGER = 256 * 1024
"""A proof takes less than a thousand; but who is through may send at once."""

CONNECTION_LIMIT = 1024
DRAIN_TIMEOUT = 0.5


REMEDIES = {
    "wrong-key": "start it with a fresh ticket from `pxd ticket`",
    "old-key": "start it with a fresh ticket from `pxd ticket`",
    "version": "run the same release of pxd on both machines",
    "banned": "let it back in with `pxd kick --undo`",
}
"""By the reason of a refusal, what to do where the refused one is wanted."""

_HUNG_UP = (
    "too many connections from {} failed to prove the cluster key; for now most of what comes from "
    "there is closed at once. A node with an outdated ticket, or somebody trying the door"
)


class DialFailed(Exception):
    """`reason` is one word: unreachable, nobody (nothing listens there), other-peer, not-pxd, or
    what `ProofFailed` has."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Route(NamedTuple):
    """How two nodes came to be connected. `address` is for people; `host` the IP address at the
    other end, empty where `relay`, a peer id, passes everything on. `punched`: both ends are behind
    NAT and opened the way for this one connection, so no other port can be reached there."""

    address: str
    host: str = ""
    relay: str = ""
    punched: bool = False

    @property
    def path(self) -> Literal["direct", "punched", "relayed"]:
        if self.relay:
            return "relayed"
        return "punched" if self.punched else "direct"

    @property
    def patience(self) -> float:
        """Seconds within which admission must be through."""
        return RELAYED_ADMISSION_TIMEOUT if self.relay else ADMISSION_TIMEOUT


class Connection:
    """An authenticated connection; of use to anybody only once it is `admitted`.

    `drain` is awaited, for a short while, before the connection is closed in good order. `uses`
    are asked whether something on a stream that `may_rest` would be lost if it were closed now.
    """

    def __init__(self, secured: NoiseConnection, route: Route, *, dialled: bool) -> None:
        self.peer = secured.peer
        self.binding = secured.binding
        self.local_host = secured.local_host
        self.route = route
        self.host = route.host
        self.address = route.address
        self.dialled = dialled
        self.instance = b""
        self.admitted = trio.Event()
        self.decided = trio.Event()
        self.failure: ProofFailed | None = None
        self.muxer = Yamux(secured, initiator=dialled)
        if not dialled:
            # Each holds a window of unread bytes. A dialer needs one for the proof; the other one
            # may come while this end is about to learn that it has accepted the proof.
            self.muxer.inbound_limit = STREAMS_PER_STRANGER
            self.muxer.receive_limit = BYTES_PER_STRANGER
        self._proof_offered = trio.Event()
        self.drain: Callable[[], Awaitable[None]] = trio.lowlevel.checkpoint
        self.uses: list[Callable[[], bool]] = []
        self._may_rest: WeakSet[YamuxStream] = WeakSet()
        self._proof_stream: YamuxStream | None = None

    async def open_stream(self, protocol: str) -> YamuxStream:
        """Raises `StreamClosed` when the peer does not serve `protocol` or the connection ended."""
        stream = self.muxer.open_stream()
        try:
            with trio.fail_after(STREAM_TIMEOUT):
                await select([protocol], stream)
        except (MultiselectError, MultiselectClientError, trio.TooSlowError) as error:
            stream.reset()
            raise StreamClosed(f"{protocol} is not served by {self.peer}: {error}") from error
        except BaseException:
            stream.reset()
            raise
        return stream

    @property
    def relay(self) -> str:
        """The peer id of the member that passes everything on; empty for a direct connection."""
        return self.route.relay

    def may_rest(self, stream: YamuxStream) -> YamuxStream:
        """That it is open does not mean that it is in use; `uses` tell that."""
        self._may_rest.add(stream)
        return stream

    @property
    def in_use(self) -> bool:
        """Whether closing it would break something off."""
        streams = self.muxer.open_streams
        return any(stream not in self._may_rest for stream in streams) or any(
            use() for use in self.uses
        )

    @property
    def awaits_proof(self) -> bool:
        """Until it has, the dialer is offered the key proof and nothing else."""
        return not self.dialled and self._proof_stream is None

    async def offer_proof(self, stream: YamuxStream) -> None:
        """Raises MultiselectError or `StreamClosed` when the dialer wants something else."""
        await answer([keyproof.PROTOCOL], stream)
        if not self.awaits_proof:
            raise StreamClosed("one key proof is enough")
        self._proof_stream = self.may_rest(stream)
        self._proof_offered.set()

    async def prove(self, proof: KeyProof) -> bytes:
        """Run the key proof; returns the peer's instance. Raises `ProofFailed`."""
        try:
            if self.dialled:
                stream = self.may_rest(await self.open_stream(keyproof.PROTOCOL))
                return await proof.dial(stream, self.peer, self.binding)
            await self._proof_offered.wait()
            assert self._proof_stream
            return await proof.listen(self._proof_stream, self.peer, self.binding)
        except StreamClosed as error:
            raise ProofFailed("protocol", f"it did not prove the cluster key ({error})") from error


class Attendant(Protocol):
    """Run for every admitted connection until it ends. `started` means that it may be used."""

    async def __call__(
        self, connection: Connection, *, task_status: "trio.TaskStatus[None]"
    ) -> None: ...


StreamHandler = Callable[[Connection, YamuxStream], Awaitable[None]]


class Host:
    """`handlers` (by protocol name) and `attend` see admitted connections only.

    `handlers` may be added to until `run` runs.
    """

    def __init__(
        self,
        identity: Identity,
        proof: KeyProof,
        refusals: Refusals,
        handlers: Mapping[str, StreamHandler],
        attend: Attendant,
    ) -> None:
        self._identity = identity
        self._proof = proof
        self._refusals = refusals
        self.handlers = dict(handlers)
        self._attend = attend
        self._pending = PendingConnections()
        self._penalties = Penalties()
        self._connections: set[Connection] = set()
        self._nursery: trio.Nursery | None = None

    async def run(
        self,
        listeners: list[trio.SocketListener],
        *,
        task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Serve `listeners` until cancelled; then say goodbye on every connection and close it."""
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            try:
                task_status.started()
                await trio.serve_listeners(self._accept, listeners, handler_nursery=nursery)
            finally:
                self._nursery = None
                with trio.CancelScope(shield=True):
                    await self._close_all()

    @property
    def banned(self) -> frozenset[str]:
        """Peers that are neither dialled nor let in."""
        return self._proof.banned

    async def dial(self, address: Address) -> Connection:
        """Return an admitted connection. Raises `DialFailed` within `ADMISSION_TIMEOUT` seconds."""

        async def open_tcp() -> Transport:
            try:
                return TcpStream(await trio.open_tcp_stream(address.host, address.port))
            except OSError as error:
                raise _no_connection(error) from error
            except ValueError as error:
                # Names that cannot be looked up, such as those with a label that is too long.
                raise DialFailed("unreachable", f"no usable host name ({error})") from error

        route = Route(f"{address.host}:{address.port}", address.host)
        return await self.dial_over(open_tcp, address.peer, route)

    async def dial_over(
        self, open_transport: Callable[[], Awaitable[Transport]], peer: str, route: Route
    ) -> Connection:
        """Like `dial`, over any byte stream; `open_transport` may raise `DialFailed`."""
        connection = None
        try:
            with trio.move_on_after(route.patience):
                connection = await self._connect(open_transport, peer, route)
                await connection.decided.wait()
        finally:
            if connection and not connection.admitted.is_set():
                connection.muxer.abort("not admitted")
        if not connection:
            raise DialFailed(
                "unreachable",
                f"no answer within {route.patience:g} s; is a firewall in the way?",
            )
        if not connection.admitted.is_set():
            failure = connection.failure or ProofFailed("protocol", connection.muxer.reason)
            raise DialFailed(failure.reason, str(failure))
        return connection

    async def _connect(
        self, open_transport: Callable[[], Awaitable[Transport]], peer: str, route: Route
    ) -> Connection:
        if not self._nursery:
            raise DialFailed("unreachable", "this node is stopping")
        transport = await open_transport()
        try:
            secured = await self._identity.secure_outbound(transport, peer)
        except PeerIDMismatchesPubkey as error:
            transport.abort()
            raise DialFailed("other-peer", "another node than expected answers there") from error
        except Exception as error:
            log.debug("the handshake with %s failed", route.address, exc_info=True)
            transport.abort()
            raise DialFailed("not-pxd", "what answers there does not act like pxd") from error
        except trio.Cancelled:
            transport.abort()
            raise
        return self._keep(secured, route, dialled=True)

    async def _accept(self, stream: trio.SocketStream) -> None:
        try:
            name = stream.socket.getpeername()
            host, port = host_in(name), name[1]
        except OSError:
            # Gone before it was looked at.
            return
        await self.accept(TcpStream(stream), Route(f"{host}:{port}", host))

    async def accept(self, transport: Transport, route: Route, peer: str = "") -> None:
        """Let in whoever is at the other end, if it is a member; returns when the connection ended.

        `peer` is who it says to be, if that is known; it is given up where somebody else shows up.
        """
        connection = None
        caller = route.host or peer
        if not self._penalties.allows(caller, trio.current_time()):
            self._refusals.warn(caller, "", "too-many-failures", _HUNG_UP.format(caller))
            transport.abort()
            return
        try:
            with self._pending.admit(caller, within=route.patience):
                secured = await self._identity.secure_inbound(transport)
                if peer and secured.peer != peer:
                    raise DialFailed("other-peer", f"{secured.peer} where {peer} was announced")
                connection = self._keep(secured, route, dialled=False)
                await connection.decided.wait()
        except Exception:
            log.debug("an inbound handshake failed", exc_info=True)
        finally:
            self._judge(caller, connection)
            if connection is None:
                transport.abort()
            elif not connection.admitted.is_set():
                connection.muxer.abort("no proof of the cluster key in time")
        if connection:
            # The caller closes the transport when this returns; `_close_all` ends the wait.
            with trio.CancelScope(shield=True):
                await connection.muxer.closed.wait()

    def _judge(self, caller: str, connection: Connection | None) -> None:
        """Whatever kept an inbound connection from being admitted, it has cost this node work."""
        if connection and connection.admitted.is_set():
            self._penalties.admitted(caller, trio.current_time())
        else:
            self._penalties.failed(caller, trio.current_time())

    def _keep(self, secured: NoiseConnection, route: Route, *, dialled: bool) -> Connection:
        connection = Connection(secured, route, dialled=dialled)
        if self._nursery and len(self._connections) < CONNECTION_LIMIT:
            self._nursery.start_soon(self._serve, connection)
        else:
            connection.muxer.abort("too many connections")
            connection.decided.set()
        return connection

    async def _serve(self, connection: Connection) -> None:
        self._connections.add(connection)
        try:
            async with trio.open_nursery() as nursery:
                # Shielded, so that it still works while `_close_all` closes it in good order.
                nursery.cancel_scope.shield = True
                nursery.start_soon(self._carry, connection, nursery.cancel_scope)
                if await self._admit(connection):
                    await nursery.start(self._attend, connection)
                    connection.admitted.set()
                    connection.decided.set()
        except Exception:
            log.exception("the connection with %s failed", connection.address)
            connection.muxer.abort("an error in this node, see its log")
        finally:
            connection.decided.set()
            self._connections.discard(connection)
            if connection.admitted.is_set():
                reason = connection.muxer.reason
                log.info("the connection with %s ended: %s", connection.peer, reason)

    async def _carry(self, connection: Connection, scope: trio.CancelScope) -> None:
        await connection.muxer.run(partial(self._on_stream, connection))
        scope.cancel()

    async def _admit(self, connection: Connection) -> bool:
        if connection.peer == self._identity.peer_id:
            connection.muxer.abort("a connection to myself")
            return False
        try:
            with trio.move_on_after(connection.route.patience):
                connection.instance = await connection.prove(self._proof)
                connection.muxer.window = WINDOW
                connection.muxer.inbound_limit = STREAMS_PER_MEMBER
                connection.muxer.receive_limit = None
                return True
            raise ProofFailed("protocol", "it did not prove the cluster key in time")
        except ProofFailed as error:
            connection.failure = error
            if not connection.dialled:
                self._refusals.warn(
                    connection.host or connection.address,
                    connection.peer,
                    error.reason,
                    f"refused {connection.address} (peer {connection.peer}): {error}; if it is "
                    f"meant to join, {REMEDIES.get(error.reason, REMEDIES['wrong-key'])}",
                )
            await connection.muxer.close(f"refused: {error}")
            return False

    async def _on_stream(self, connection: Connection, stream: YamuxStream) -> None:
        try:
            if connection.awaits_proof:
                await connection.offer_proof(stream)
                await connection.muxer.closed.wait()
            await connection.admitted.wait()
            with trio.fail_after(STREAM_TIMEOUT):
                protocol = await answer(list(self.handlers), stream)
            await self.handlers[protocol](connection, stream)
            stream.finish()
        except (MultiselectError, StreamClosed, trio.TooSlowError) as error:
            log.debug("a stream of %s ended: %s", connection.peer, error)
        except Exception:
            log.exception("serving a stream of %s failed", connection.peer)
        finally:
            stream.reset()

    async def _close_all(self) -> None:
        async with trio.open_nursery() as nursery:
            for connection in tuple(self._connections):
                nursery.start_soon(_close, connection, "this node is stopping")


async def _close(connection: Connection, reason: str) -> None:
    with trio.move_on_after(DRAIN_TIMEOUT):
        await connection.drain()
    await connection.muxer.close(reason)


def _no_connection(error: OSError) -> DialFailed:
    cause = error.__cause__
    while isinstance(cause, BaseExceptionGroup):
        cause = cause.exceptions[0]
    if isinstance(cause, ConnectionRefusedError) or isinstance(error, ConnectionRefusedError):
        message = "nobody listens there (connection refused); is pxd running on that machine?"
        return DialFailed("nobody", message)
    return DialFailed("unreachable", str(cause or error))
