"""The daemon: builds the parts, runs them in one nursery, starts and stops them."""

import contextlib
import logging
import os
import secrets
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping
from functools import partial

import msgspec
import trio

import pxd
from pxd import identity
from pxd.api.app import create_app
from pxd.api.server import serve as serve_http
from pxd.cluster.members import Member
from pxd.cluster.plans import Plan
from pxd.cluster.records import Device, NodeRecord, StageReport
from pxd.doctor.doctor import Doctor
from pxd.doctor.findings import Report
from pxd.executors import describe_model, open_executor, quantize_model, scratch
from pxd.notify import notify
from pxd.p2p.addresses import for_tickets
from pxd.p2p.bandwidth import Meter
from pxd.p2p.gossip import Gossip, GossipEvent
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.listening import endpoint
from pxd.p2p.signatures import NodeSigner
from pxd.planning.model import NodeOffer
from pxd.selfhood import Identity, for_people, identify, measured_device, memory_offer
from pxd.selfhood import StartupError as StartupError
from pxd.serving.audit import Audit
from pxd.serving.choice import Choices, from_state
from pxd.serving.clients import Clients
from pxd.serving.departure import Departure
from pxd.serving.door import Door
from pxd.serving.drain import Drains
from pxd.serving.heads import HeadHost
from pxd.serving.hints import hints
from pxd.serving.ingress import ChatIngress
from pxd.serving.planner import Office, Planner
from pxd.serving.plansync import PlanSync
from pxd.serving.report import LoadReport
from pxd.serving.shelf import Shelf
from pxd.serving.signal import Signal
from pxd.serving.stage import StageHost
from pxd.serving.status import ClusterStatus
from pxd.serving.survey import Survey
from pxd.serving.timings import partners
from pxd.serving.view import Planning, model_views, node_views, planning, turned_away
from pxd.settings import DEFAULT_HTTP, DEFAULT_LISTEN, Settings
from pxd.signals import stop_on_signal
from pxd.wire import Buffer, Cancel, Copied, Filler, Frame, Nack, Output, Sampled, Step, Weights

log = logging.getLogger("pxd.node")

LEAVE_DEADLINE_S = 1.5
ADDRESSES_EVERY_S = 15.0
MAX_ADDRESSES = 16


class Started(msgspec.Struct, frozen=True):
    """What a person needs to know once the daemon is up. The ticket holds the cluster key."""

    name: str
    http: str
    ticket: str
    peer_id: str


class Node:
    """One daemon's parts and how they hear of each other. Use `run`."""

    def __init__(self, settings: Settings, who: Identity, device: Device) -> None:
        self.settings = settings
        self.control_token = secrets.token_urlsafe(32)
        self._state = who.state
        self._began = time.monotonic()
        self._http_url = ""
        self._stop = trio.Event()
        self._closing = trio.Event()
        self._http_done = trio.Event()
        self._expects_peers = bool(settings.join) or settings.files.peers.exists()
        self._lives: dict[str, float] = {}
        self._problems: dict[str, str] = {}
        self._saving = trio.Lock()
        self.changed = Signal()
        self.clients = Clients(self.changed.notify)
        self.network = Libp2pNetwork(
            node_seed=who.node_seed,
            cluster_key=who.ring.key,
            listen=endpoint(settings.listen, DEFAULT_LISTEN),
            mdns=settings.mdns,
            peers_file=settings.files.peers,
            join=who.join,
            relay=settings.relay,
        )
        self.gossip = Gossip(
            self.network,
            self._first_record(device),
            signer=NodeSigner(who.node_seed),
            term=who.state.term,
            seed=secrets.randbits(32),
            expects_peers=self._expects_peers,
            persist=self._persist,
        )
        self.gossip.on_event(self._on_event)
        [kind] = device.executors
        self._shelf = Shelf(
            self.network,
            self.gossip,
            settings.files.cache,
            partial(describe_model, kind=kind, scratch_root=settings.files.scratch),
            quantize=quantize_model if kind != "sglang" else None,
            added=who.state.added,
            quantized=who.state.quantized,
            chosen=lambda: self.choices.current.names,
            plan=lambda: self.plans.plan,
            save=self._save,
            busy=self._serves_now,
            changed=self.changed,
        )
        self.models, self.added = self._shelf.models, self._shelf.added
        self._sharing = self._shelf.sharing
        self.choices = Choices(
            self.gossip, self._save, self.models.describe, settings.model, time.time
        )
        self.door = Door(
            self.network, self._members, settings.files, who.ring, who.bans, self._on_door
        )
        self.plans = PlanSync(self.network, self._members, self._on_plan, lambda: self.gossip.leads)
        open_here = partial(open_executor, kind, scratch_root=settings.files.scratch)
        self.stages = StageHost(self.network, open_here, self.models.directory, self._on_stages)
        self.stages.allow_tier(settings.kv_tier_bytes, settings.files.cache)
        self.stages.send_as(settings.wire_dtype)
        self.stages.spread_over(settings.tensor_parallel)
        self.drains = Drains(
            self.network, self._members, self.gossip, self._save, self.stages.forgive
        )
        self.heads = HeadHost(
            self.network,
            self.stages.feed,
            settings.admission,
            settings.speculate,
            self.stages.feed_now,
        )
        self._ingress = ChatIngress(
            self.network,
            self.models,
            lambda: self.plans.plan,
            self._members,
            self.changed,
            settings.request_timeout,
        )
        self.planner = Planner(
            self.network.peer_id,
            self.models,
            self.plans,
            self._office,
            self._members,
            lambda: self.choices.current,
        )
        self._audit = Audit(
            self.network.peer_id, self._own_offer, partial(self._on_problem, "audit")
        )
        self._survey = Survey(
            self.network.peer_id,
            self._members,
            self.network.host_of,
            self._partners,
            self._occupied,
            partial(Meter, self.network),
        )
        self._report = LoadReport(
            self.gossip, self.heads, self.stages, self._survey, self._partners
        )
        self._departure = Departure(
            self.network.peer_id,
            settings.leave_timeout,
            self.gossip,
            lambda: self.plans.plan,
            self._members,
            self.clients,
        )
        self._doctor = Doctor(
            self.network,
            self._members,
            self.status,
            lambda: list(self.choices.current.names),
            settings,
        )
        self.network.on_frame(self._on_frame, self._expects)
        self.network.on_peer(self._on_peer)

    def _first_record(self, device: Device) -> NodeRecord:
        settings, state = self.settings, self._state
        return NodeRecord(
            id=self.network.peer_id,
            name=settings.name,
            incarnation=state.incarnation,
            pxd=pxd.__version__,
            device=device,
            memory=memory_offer(settings, device),
            max_layers=settings.max_layers,
            priority=settings.priority,
            term=state.term,
            choice=from_state(state),
            drained=state.drained,
            relay=settings.relay,
            started=time.time(),
        )

    async def run(self, started: Callable[[Started], None]) -> None:
        """Serve until `stop` is called; leaves the cluster before it returns.

        Raises `StartupError` when a port cannot be had.
        """
        await self._on_door(self.door.ring, self.door.bans.banned)
        async with trio.open_nursery() as nursery:
            try:
                await nursery.start(self.network.run)
                http = endpoint(self.settings.http, DEFAULT_HTTP)
                server = partial(serve_http, create_app(self), *http, shutdown=self._closing)
                self._http_url = await nursery.start(self._serve_http, server)
            except OSError as error:
                raise StartupError(str(error)) from error
            nursery.start_soon(self.door.run)
            await nursery.start(self.heads.run)
            await nursery.start(self._ingress.run)
            nursery.start_soon(self.stages.run)
            nursery.start_soon(self.plans.run)
            self._tell_addresses()
            await nursery.start(self.gossip.run)
            nursery.start_soon(self._follow_addresses)
            nursery.start_soon(self.planner.run, self.changed)
            nursery.start_soon(self._audit.run)
            nursery.start_soon(self._survey.run)
            nursery.start_soon(self._report.run)
            nursery.start_soon(self.choices.run, self.changed)
            nursery.start_soon(self._shelf.run)
            with self._announced():
                started(
                    Started(self.settings.name, self._http_url, self.ticket(), self.network.peer_id)
                )
                notify(f"READY=1\nSTATUS=API at {self._http_url}")
                await self._stop.wait()
                notify("STOPPING=1")
                await self._departure.prepare(self.changed)
            self._closing.set()
            log.info("leaving the cluster")
            await self.gossip.leave(LEAVE_DEADLINE_S)
            await self._http_done.wait()
            nursery.cancel_scope.cancel()

    async def _serve_http(
        self, server: Callable[..., Awaitable[None]], *, task_status: "trio.TaskStatus[str]"
    ) -> None:
        try:
            await server(task_status=task_status)
        finally:
            self._http_done.set()

    @contextlib.contextmanager
    def _announced(self) -> Iterator[None]:
        """Other pxd commands find the daemon by this file while it exists."""
        path = self.settings.files.daemon
        content = {"pid": os.getpid(), "http": self._http_url, "started": time.time()}
        content["token"] = self.control_token
        identity.write_private(path, msgspec.json.encode(content))
        try:
            yield
        finally:
            path.unlink(missing_ok=True)

    def stop(self, *, now: bool = False) -> float:
        """Begin to leave; returns how many seconds others are waited for at most."""
        self._stop.set()
        if now:
            self._departure.hurry()
        return 0.0 if now else self.settings.leave_timeout

    @property
    def ingress(self) -> ChatIngress:
        return self._ingress

    def ticket(self) -> str:
        ring, network = self.door.ring, self.network
        addresses = (*for_tickets(network.addresses()), *network.circuit_addresses())
        return str(identity.Ticket(ring.key, addresses, ring.cluster, ring.generation))

    def status(self) -> ClusterStatus:
        peers = self.network.peers()
        now, uptime = trio.current_time(), time.monotonic() - self._began
        epoch = self.plans.plan.epoch if self.plans.plan else None
        nodes = node_views(
            self.gossip.members,
            now,
            own_id=self.network.peer_id,
            routes={peer: self.network.route_of(peer) for peer in peers},
            bandwidths=self._survey.bandwidths(),
            refused="" if peers else turned_away(self.network.refusals(), time.time()),
        )
        return ClusterStatus(
            self_id=self.network.peer_id,
            leader=self.gossip.leader,
            term=self.gossip.term,
            epoch=str(epoch) if epoch else None,
            nodes=nodes,
            models=model_views(self.plans.plan, self._members()),
            http=self._http_url,
            version=pxd.__version__,
            uptime=round(uptime, 1),
            hints=hints(
                self.network.discovery(),
                self.network.refusals(),
                connected=bool(peers),
                expects_peers=self._expects_peers,
                uptime=uptime,
                now=time.time(),
            ),
            added=self.added.views(),
            looking=self.models.looking,
            waits_for=self._departure.waits_for,
        )

    async def doctor(self) -> Report:
        return await self._doctor.examine()

    def planning(self) -> Planning | None:
        return planning(self.plans.plan, self._members())

    def _members(self) -> Mapping[str, Member]:
        return self.gossip.members

    def _office(self) -> Office:
        return Office(held=self.gossip.leads > 0, term=self.gossip.leads)

    def _on_event(self, _event: GossipEvent) -> None:
        """The view of the cluster is another one: everybody who lives by it looks at it anew."""
        self.choices.follow()
        members = self.gossip.members
        lives = {
            peer: member.record.started
            for peer, member in members.items()
            if member.state in ("alive", "suspect")
        }
        for peer, life in self._lives.items():
            if lives.get(peer) != life:
                self.heads.peer_gone(peer)
        self._lives = lives
        self.network.use_relays(frozenset(peer for peer in lives if members[peer].record.relay))
        self.plans.follow()
        self.door.follow()
        self.heads.follow(members)
        self._ingress.follow()
        self.changed.notify()

    def _on_peer(self, peer: str, up: bool) -> None:
        if not up:
            self._ingress.connection_lost(peer)
            self.heads.connection_lost(peer)
            self.heads.follow(self.gossip.members)

    async def _on_door(self, ring: identity.Keyring, banned: frozenset[str]) -> None:
        self.network.set_keys(ring)
        self.gossip.expel(banned)
        await self.network.shut_out(banned)
        self.gossip.update(door=self.door.digest, keys=ring.generation)

    def _on_plan(self, plan: Plan) -> None:
        self.stages.apply(plan)
        self.heads.apply(plan)
        self._ingress.apply(plan)
        self._audit.check(plan)
        self.gossip.update(plan=plan.epoch)

    def _own_offer(self) -> NodeOffer:
        record = self.gossip.record
        return NodeOffer(id=record.id, memory=record.memory, max_layers=record.max_layers)

    def _on_problem(self, source: str, problem: str) -> None:
        """What `source` finds wrong with this node now, empty if nothing."""
        self._problems[source] = problem
        found = "; ".join(filter(None, self._problems.values()))
        self.gossip.update(problem=found[:2000])

    def _on_stages(self, reports: tuple[StageReport, ...]) -> None:
        self.gossip.update(stages=reports)

    async def _persist(self, incarnation: int, term: int) -> None:
        try:
            await self._save(incarnation=incarnation, term=term)
        except OSError as error:
            reason = error.strerror or error
            self._on_problem("disk", f"cannot write to {self.settings.data_dir}: {reason}")
            raise
        self._on_problem("disk", "")

    async def _save(self, **changes: object) -> None:
        async with self._saving:
            state = msgspec.structs.replace(self._state, **changes)
            if state != self._state:
                write = partial(identity.write_state, self.settings.files.state, state)
                await trio.to_thread.run_sync(write)
                self._state = state

    async def _follow_addresses(self) -> None:
        """Laptops change networks; members must learn of it."""
        while True:
            with trio.move_on_after(ADDRESSES_EVERY_S):
                await self.network.wait_moved()
            self._tell_addresses()

    def _tell_addresses(self) -> None:
        self.gossip.update(addresses=self.network.addresses()[:MAX_ADDRESSES])

    def _partners(self) -> frozenset[str]:
        return partners(self.plans.plan, self.network.peer_id)

    def _occupied(self) -> bool:
        loading = any(stage.state == "loading" for stage in self.gossip.record.stages)
        return loading or self._sharing.under_way or self._heads_run()

    def _heads_run(self) -> bool:
        return self.heads.running > 0 or self.heads.waiting > 0

    def _serves_now(self) -> bool:
        return self._heads_run() or self._survey.frames_come

    def _expects(self, peer: str, frame: Frame) -> bool:
        if isinstance(frame, Weights):
            return self._sharing.expects(peer, frame)
        return self.stages.expects(peer, frame)

    async def _on_frame(self, peer: str, frame: Frame, body: Buffer) -> None:
        if isinstance(frame, Filler):
            self._survey.meter.arrived(peer, frame)
            return
        if isinstance(frame, Weights):
            self._sharing.arrived(peer, frame, body)
            return
        self._survey.frame_arrived()
        match frame:
            case Step():
                await self.stages.feed(peer, frame, body)
            case Sampled():
                self.heads.sampled(peer, frame)
            case Copied():
                self.heads.copied(peer, frame)
            case Nack():
                self.heads.nack(peer, frame)
            case Output():
                self._ingress.output(peer, frame)
            case Cancel():
                self.heads.cancel(peer, frame)


async def run(settings: Settings, *, started: Callable[[Started], None]) -> None:
    """Run a daemon until SIGINT, SIGTERM or `Node.stop`; a second signal has it wait for nothing
    any more, and a third SIGINT ends it without a goodbye.

    Raises `IdentityError` and `StartupError` with a message for people.
    """
    identity.prepare_data_dir(settings.data_dir)
    try:
        await _run(settings, started)
    except BaseExceptionGroup as group:
        error = for_people(group)
        if error is None:
            raise
        raise error from None


async def _run(settings: Settings, started: Callable[[Started], None]) -> None:
    with identity.lock_data_dir(settings.files.lock):
        # Of executors whose daemon was killed, and could not tidy up after them.
        scratch.remove(settings.files.scratch)
        who = identify(settings)
        starting = trio.CancelScope()
        node: Node | None = None

        def stop(now: bool) -> None:
            if node is None:
                starting.cancel()
            else:
                node.stop(now=now)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(stop_on_signal, stop)
            with starting:
                device = await measured_device(settings)
            if not starting.cancelled_caught:
                node = Node(settings, who, device)
                await node.run(started)
            nursery.cancel_scope.cancel()
