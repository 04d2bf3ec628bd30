"""`Network` over libp2p: puts host, calls, data channels and discovery together."""

import hashlib
import logging
from collections.abc import Awaitable, Callable
from pathlib import Path

import trio

from pxd import wire
from pxd.identity import Keyring
from pxd.p2p import channels, circuit, observed, punch, rpc
from pxd.p2p.addressbook import AddressBook
from pxd.p2p.addresses import Address, parse_address, parse_peer_addresses
from pxd.p2p.admission import Admission
from pxd.p2p.casts import DroppingQueue
from pxd.p2p.channels import DataChannels
from pxd.p2p.circuit import Circuits, join_circuit, split_circuit
from pxd.p2p.dialer import Dialer
from pxd.p2p.discovery import Discovery
from pxd.p2p.host import Connection, Host, Route
from pxd.p2p.inbox import FrameInbox
from pxd.p2p.interfaces import reachable_hosts
from pxd.p2p.keyproof import KeyProof
from pxd.p2p.listening import listen, listen_beside
from pxd.p2p.loopback import Loopback
from pxd.p2p.mdns import Heard
from pxd.p2p.muxer import YamuxStream
from pxd.p2p.neighbours import Neighbours
from pxd.p2p.network import (
    CallTimeout,
    FrameFilter,
    FrameHandler,
    Method,
    PeerHandler,
    PeerUnreachable,
    RequestT,
    ResponseT,
)
from pxd.p2p.punch import Upgrades
from pxd.p2p.refusals import Refusal, Refusals
from pxd.p2p.relay import Relay
from pxd.p2p.rerouting import Rerouting
from pxd.p2p.roaming import Moved, Roaming
from pxd.p2p.routes import routes
from pxd.p2p.secure import Identity
from pxd.p2p.services import Services, decode_response, encode_message
from pxd.p2p.sessions import Session, Sessions
from pxd.p2p.sightings import Discovered

log = logging.getLogger("pxd.p2p")

CAST_PATIENCE = 3.0
"""Seconds for which a cast waits for a connection."""

HANG_UP_TIMEOUT = 3.0
SAVE_INTERVAL = 1.0
CIRCUIT_ADDRESSES = 4
MAX_ADDRESSES = 16


class Libp2pNetwork:
    """Works while `run` runs. `join` are multiaddrs of members; `listen` port 0 takes a free one.

    A `body` given to `send` must not be changed afterwards. `direct_channels=False` sends frames
    over libp2p only. With `relay`, traffic of members that cannot reach each other is passed on.
    """

    def __init__(
        self,
        *,
        node_seed: bytes,
        cluster_key: bytes,
        listen: tuple[str, int],
        mdns: bool,
        peers_file: Path,
        join: tuple[str, ...] = (),
        direct_channels: bool = True,
        relay: bool = False,
    ) -> None:
        identity = Identity(node_seed)
        self.identity = identity
        self.peer_id = identity.peer_id
        self._admission = Admission(Keyring.first(cluster_key))
        self._listen = listen
        self._mdns = mdns
        self._join, self._named_relays = _read(join, self.peer_id)
        self._relays: frozenset[str] = frozenset()
        self._book = AddressBook(peers_file, pinned=self._join)
        self._refusals = Refusals()
        self._services = Services()
        self._sessions = Sessions(self.peer_id)
        self._inbox = FrameInbox()
        self._channels = DataChannels(
            self._sessions, self._inbox, self._hosts_of, direct=direct_channels
        )
        self._services.add(channels.OFFER, self._channels.on_offer)
        handlers = {
            rpc.PROTOCOL: self._serve_calls,
            channels.PROTOCOL: self._channels.on_stream,
            observed.PROTOCOL: observed.tell,
        }
        if relay:
            handlers[circuit.HOP] = Relay(self._sessions, lambda: self._admission.banned).serve
        proof = KeyProof(self._admission, self.peer_id)
        self._host = Host(identity, proof, self._refusals, handlers, self._attend)
        self._circuits = Circuits(self._host)
        self._host.handlers[circuit.STOP] = self._circuits.serve
        self._roaming = Roaming()
        self._rerouting = Rerouting(
            self.peer_id, self._host, self._sessions, self._book, lambda: self._roaming.locals
        )
        self._neighbours = Neighbours(
            self.peer_id, self._admission, self._roaming, self._hosts, self._heard
        )
        self._bound: list[str] = []
        self._port = 0
        self._nursery: trio.Nursery | None = None
        self._dialer: Dialer | None = None
        self._upgrades: Upgrades | None = None
        self._discovery: Discovery | None = None
        self._vanished_handlers: list[Callable[[str], None]] = []
        self._call_streams: dict[Connection, YamuxStream] = {}
        self._late_casts: dict[str, DroppingQueue[tuple[str, bytes]]] = {}
        self._loopback = Loopback(self.peer_id, self._services, self._inbox)

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Listen, then find and serve peers until cancelled. Raises OSError for a taken port."""
        self._book.load()
        listeners = await listen(*self._listen)
        try:
            self._bound = [listener.socket.getsockname()[0] for listener in listeners]
            self._port = listeners[0].socket.getsockname()[1]
            data_listeners = await listen_beside(self._listen[0], self._port)
            async with trio.open_nursery() as nursery:
                self._nursery = nursery
                self._dialer = Dialer(
                    nursery,
                    self._host,
                    self._sessions,
                    self._book,
                    self._refusals,
                    self._circuits,
                    self._relays_for,
                    lambda: self._roaming.locals,
                    self._nobody_there,
                )
                self._upgrades = Upgrades(nursery, self._host, self._sessions, self._dialer)
                self._host.handlers[punch.PROTOCOL] = self._upgrades.serve
                await nursery.start(self._host.run, listeners)
                await nursery.start(self._channels.run, data_listeners)
                nursery.start_soon(self._loopback.run)
                nursery.start_soon(self._save_regularly)
                nursery.start_soon(self._roaming.run, self._on_moved)
                self._discover(nursery, self._dialer)
                task_status.started()
        finally:
            self._nursery = None
            for listener in listeners:
                listener.socket.close()
            with trio.CancelScope(shield=True):
                await self._save()

    def addresses(self) -> tuple[str, ...]:
        """Own multiaddrs; those of the interfaces that are up now. Empty until `run` listens."""
        return tuple(str(Address(host, self._port, self.peer_id)) for host in self._hosts())

    async def wait_moved(self) -> None:
        """Return when this machine has moved: `addresses` may tell others than before."""
        await self._roaming.moved.wait()

    def discovery(self) -> Discovered:
        """What multicast has shown."""
        return self._neighbours.sightings.told()

    def peers(self) -> frozenset[str]:
        return self._sessions.peers()

    def refusals(self) -> tuple[Refusal, ...]:
        """Why peers were not let in and why dials failed lately, oldest first; bounded."""
        return self._refusals.latest()

    def ports(self) -> tuple[int, int]:
        """The listen port and the data port; 0 before `run` listens."""
        return self._port, self._channels.port

    def host_of(self, peer: str) -> str | None:
        """The IP address at the other end of the connection with `peer`, empty where a relay is in
        between; None without a connection."""
        route = self.route_of(peer)
        return None if route is None else route.host

    def route_of(self, peer: str) -> Route | None:
        """How this node is connected with `peer` now; None if it is not."""
        session = self._sessions.get(peer)
        return session.connection.route if session and session.alive else None

    def relayed(self) -> frozenset[str]:
        """Peers that are connected through a relay only."""
        routes = {peer: self.route_of(peer) for peer in self._sessions.peers()}
        return frozenset(peer for peer, route in routes.items() if route and route.relay)

    def use_relays(self, peers: frozenset[str]) -> None:
        """From now on exactly these members, and those named in a ticket, are asked to pass
        traffic on."""
        self._relays = peers

    def circuit_addresses(self) -> tuple[str, ...]:
        """Multiaddrs through the relays that this node is connected to, for others to join by."""
        return tuple(
            join_circuit(address, self.peer_id)
            for relay in self._relays_for(self.peer_id)
            for address in self._book.addresses(relay.peer)[:1]
        )[:CIRCUIT_ADDRESSES]

    def _relays_for(self, peer: str) -> list[Connection]:
        """In the same order at both ends, so that they meet at one, but not at the same for all."""
        sessions = [self._sessions.get(relay) for relay in self._relays | self._named_relays]
        direct = [each.connection for each in sessions if each and each.direct]

        def rank(relay: Connection) -> bytes:
            ends = "".join(sorted((self.peer_id, peer)))
            return hashlib.sha256(f"{ends}{relay.peer}".encode()).digest()

        return sorted((relay for relay in direct if relay.peer != peer), key=rank)

    def set_keys(self, ring: Keyring) -> None:
        """From now on these keys open the door. Connections that are made stay as they are."""
        self._admission.ring = ring

    async def shut_out(self, banned: frozenset[str]) -> None:
        """From now on exactly these peers are kept out; returns when none is connected any more."""
        self._admission.banned = banned
        async with trio.open_nursery() as nursery:
            for peer in banned & self._sessions.peers():
                nursery.start_soon(self._hang_up, peer)

    async def _hang_up(self, peer: str) -> None:
        session = self._sessions.get(peer)
        with trio.move_on_after(HANG_UP_TIMEOUT):
            for connection in session.connections if session else ():
                await connection.muxer.close("it was kicked out of the cluster")
            if session:
                await session.ended.wait()

    def learn(self, peer: str, addresses: tuple[str, ...]) -> None:
        if peer != self.peer_id:
            self._learn(peer, tuple(parse_peer_addresses(peer, addresses)))

    def _learn(self, peer: str, addresses: tuple[Address, ...]) -> None:
        if self._book.learn(peer, addresses) and self._nursery:
            self._nursery.start_soon(self._rerouting.look, peer)

    def on_vanished(self, handler: Callable[[str], None]) -> None:
        self._vanished_handlers.append(handler)

    def _nobody_there(self, peer: str) -> None:
        for handler in self._vanished_handlers:
            handler(peer)

    def on_peer(self, handler: PeerHandler) -> None:
        self._sessions.on_peer(handler)

    def on_frame(self, handler: FrameHandler, wants: FrameFilter = lambda *_: True) -> None:
        self._inbox.on_frame(handler, wants)

    def serve(
        self,
        method: Method[RequestT, ResponseT],
        handler: Callable[[str, RequestT], Awaitable[ResponseT]],
    ) -> None:
        self._services.add(method, handler)

    async def call(
        self,
        peer: str,
        method: Method[RequestT, ResponseT],
        request: RequestT,
        *,
        timeout: float,
    ) -> ResponseT:
        payload = encode_message(request)
        deadline = trio.current_time() + timeout
        with trio.move_on_at(deadline):
            if peer == self.peer_id:
                answer = await self._services.answer(peer, method.name, payload)
            else:
                client = (await self._reach(peer)).client
                left = max(0.0, deadline - trio.current_time())
                answer = await client.call(method.name, payload, left)
            return decode_response(method, answer)
        raise CallTimeout(f"{method.name}: no answer from {peer} within {timeout:g} s")

    def cast(self, peer: str, method: Method[RequestT, None], message: RequestT) -> None:
        payload = encode_message(message)
        session = self._sessions.get(peer)
        if peer == self.peer_id:
            self._loopback.cast(method.name, payload)
        elif session:
            self._cast_to(session, method.name, payload)
        elif self._nursery:
            if peer not in self._late_casts:
                self._late_casts[peer] = DroppingQueue()
                self._nursery.start_soon(self._deliver_late, peer)
            self._late_casts[peer].put((method.name, payload), len(payload))

    async def send(self, peer: str, frame: wire.Frame, body: wire.Buffer = b"") -> None:
        if isinstance(body, memoryview):
            body = body.cast("B")
        header = wire.encode(frame, len(body))
        if peer == self.peer_id:
            await self._loopback.send(frame, body)
        else:
            await self._channels.send(await self._reach(peer), header, body)

    async def _reach(self, peer: str) -> Session:
        if self._dialer is None or self._nursery is None:
            raise PeerUnreachable("this node's network does not run")
        return await self._dialer.reach(peer)

    async def _attend(
        self, connection: Connection, *, task_status: "trio.TaskStatus[None]"
    ) -> None:
        if connection.peer in self._admission.banned:
            # Since it proved the key, a moment ago.
            connection.muxer.abort("it was kicked out of the cluster")
            task_status.started()
            return

        async def open_calls(protocol: str) -> YamuxStream:
            return connection.may_rest(await connection.open_stream(protocol))

        client = rpc.RpcClient(connection.peer, open_calls)
        connection.drain = client.flush
        connection.uses.append(lambda: client.busy)
        session = self._sessions.add(connection, client)
        self._refusals.forget(connection.peer)
        self._book.seen(connection.peer)
        task_status.started()
        try:
            async with trio.open_nursery() as nursery:
                if len(session.connections) > 1:
                    nursery.start_soon(self._sessions.check, session, connection)
                    nursery.start_soon(self._sessions.close_surplus, session)
                if connection.relay and self._upgrades:
                    nursery.start_soon(self._upgrades.run, session, connection)
                await client.run()
        finally:
            self._sessions.remove(session, connection)

    async def _serve_calls(self, connection: Connection, stream: YamuxStream) -> None:
        # A peer has one stream for its calls: what a message may hold counts once.
        if (older := self._call_streams.get(connection)) is not None:
            older.reset()
        self._call_streams[connection] = stream
        server = rpc.RpcServer(connection.peer, connection.may_rest(stream), self._services)

        def busy() -> bool:
            return server.busy

        connection.uses.append(busy)
        try:
            await server.run()
        finally:
            connection.uses.remove(busy)
            if self._call_streams.get(connection) is stream:
                del self._call_streams[connection]

    def _cast_to(self, session: Session, method: str, payload: bytes) -> None:
        try:
            session.client.cast(method, payload)
        except PeerUnreachable as error:
            log.debug("dropped a %s: %s", method, error)

    async def _deliver_late(self, peer: str) -> None:
        try:
            with trio.move_on_after(CAST_PATIENCE):
                session = await self._reach(peer)
                while self._late_casts[peer]:
                    self._cast_to(session, *self._late_casts[peer].get_nowait())
        except PeerUnreachable as error:
            log.debug("dropped casts: %s", error)
        finally:
            del self._late_casts[peer]

    def _discover(self, nursery: trio.Nursery, dialer: Dialer) -> None:
        discovery = self._discovery = Discovery(nursery, dialer, self._sessions)
        for peer in self._join:
            discovery.seek(peer, wanted=True)
        for peer in self._book.remembered():
            discovery.seek(peer)
        if self._mdns:
            nursery.start_soon(self._neighbours.run, self._port)

    def _heard(self, heard: Heard) -> None:
        self._learn(heard.peer, heard.addresses)
        if self._discovery:
            self._discovery.seek(heard.peer)

    def _on_moved(self, moved: Moved) -> None:
        log.info("this machine %s; looking for all others anew", moved)
        if self._nursery and self._discovery:
            if moved.slept or moved.lost:
                self._nursery.start_soon(self._sessions.check_all, moved.lost)
            self._discovery.try_again()
            for peer in self._sessions.peers() if moved.gained else ():
                self._nursery.start_soon(self._rerouting.look, peer)

    def _hosts(self) -> list[str]:
        return reachable_hosts(self._bound, self._roaming.locals)[:MAX_ADDRESSES]

    def _hosts_of(self, peer: str) -> list[str]:
        ways = routes(self._book.addresses(peer), self._roaming.locals)
        return [address.host for address in ways]

    async def _save_regularly(self) -> None:
        while True:
            await trio.sleep(SAVE_INTERVAL)
            await self._save()

    async def _save(self) -> None:
        if not self._book.changed:
            return
        try:
            await trio.to_thread.run_sync(self._book.save, self._book.snapshot())
        except OSError as error:
            log.warning("cannot remember the peers for the next start: %s", error)


def _read(
    join: tuple[str, ...], own_id: str
) -> tuple[dict[str, tuple[Address, ...]], frozenset[str]]:
    """The addresses of a ticket, by peer and without this node itself; and who is named as a relay.

    An address through a relay is one of the relay; of the peer behind it, none is known then.
    """
    found: dict[str, tuple[Address, ...]] = {}
    relays = set()
    for text in join:
        try:
            if circuit.SEPARATOR in text:
                address, behind = split_circuit(text)
                relays.add(address.peer)
                found.setdefault(behind, ())
            else:
                address = parse_address(text)
        except ValueError as error:
            log.warning("ignoring an address to join: %s", error)
            continue
        if address not in found.get(address.peer, ()):
            found[address.peer] = (*found.get(address.peer, ()), address)
    found.pop(own_id, None)
    return found, frozenset(relays)
