"""Drives membership and leadership over a `Network`: clock, casts, persistence, listeners."""

import logging
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from typing import Any

import trio

from pxd.cluster.admission import Refusal
from pxd.cluster.config import MembershipConfig
from pxd.cluster.leadership import (
    LeaderChanged,
    Leadership,
    LeadershipConfig,
    LeadershipEvent,
    LeftOffice,
    TookOffice,
)
from pxd.cluster.members import Member, MemberEvent
from pxd.cluster.membership import Membership
from pxd.cluster.messages import MAX_MESSAGE, GossipMessage
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import Signer
from pxd.cluster.stamps import ceiling
from pxd.p2p.network import Method, Network, NetworkError

log = logging.getLogger("pxd.p2p.gossip")

GossipEvent = MemberEvent | LeadershipEvent
Persist = Callable[[int, int], Awaitable[None]]
"""Store (incarnation, term) durably. Called from a task of its own, one call at a time; again and
again after an `OSError`."""

# A union of structs is what msgspec decodes, though no `type` in the eyes of a type checker.
GOSSIP: Method[GossipMessage, None] = Method(
    "gossip",
    GossipMessage,  # type: ignore[arg-type]
    type(None),
    limit=MAX_MESSAGE,
)

HAND_OVER_S = 1.0
"""How long one that leads and leaves waits for its successor."""
PERSIST_AGAIN_S = (1.0, 2.0, 5.0, 15.0, 60.0)
_SAY_FULL_EVERY_S = 60.0


class Gossip:
    """This node's part in the cluster. `run` must run for any of it to work.

    Reads of `members`, `record`, `leader` and `term` are always current. Everything runs in one
    trio task tree, so nothing changes between two checkpoints of a reader.
    """

    def __init__(
        self,
        network: Network,
        record: NodeRecord,
        *,
        signer: Signer,
        seed: int,
        term: int,
        expects_peers: bool,
        persist: Persist,
        membership: MembershipConfig | None = None,
        leadership: LeadershipConfig | None = None,
    ) -> None:
        """`record` carries this life's incarnation, persisted before and greater than every
        earlier one; `signer` holds the key of `record.id`; `term` is the greatest persisted term.
        `expects_peers` says that there is a ticket or that peers are remembered, and so perhaps a
        cluster with a leader."""
        self._network = network
        self._membership = Membership(record, membership or MembershipConfig(), seed, signer)
        self._leadership = Leadership(
            record.id, leadership or LeadershipConfig(), term=term, expects_peers=expects_peers
        )
        self._persist = persist
        self._handlers: list[Callable[[GossipEvent], None]] = []
        self._running = False
        self._dispatching = False
        self._synced = False
        self._usable_term = term
        self._said_full_at = -math.inf
        self._changed = trio.Event()
        self._wake = trio.Event()
        self._to_persist = trio.Event()

    @property
    def members(self) -> Mapping[str, Member]:
        """All known nodes by id, this one included; a live view."""
        return self._membership.members

    @property
    def record(self) -> NodeRecord:
        """This node's own record as it is gossiped now."""
        return self._membership.record

    @property
    def leader(self) -> str | None:
        """The derived leader; None while no settled member is known."""
        return self._leadership.leader

    @property
    def term(self) -> int:
        """The greatest term seen."""
        return self._leadership.term

    @property
    def leads(self) -> int:
        """The term in which this node is in office, 0 if it is not.

        A term counts only once it is persisted, so that no later life can use it again, or was
        found to be impossible to persist for now.
        """
        leads = self._leadership.leads
        return leads if leads <= self._usable_term else 0

    @property
    def health(self) -> int:
        """How badly this node itself keeps up, as its probes of others show: 0 is healthy, 8 worst.

        A node in ill health is slower to declare others dead.
        """
        return self._membership.health

    def on_event(self, handler: Callable[[GossipEvent], None]) -> None:
        """Call `handler` with every event, after it took effect. It must not block.

        It may call `update`. `TookOffice` is told when its term has been persisted.
        """
        self._handlers.append(handler)

    async def wait_changed(self) -> None:
        """Return after the next event."""
        await self._changed.wait()

    def update(self, **changes: Any) -> None:
        """Change fields of this node's record and tell the cluster."""
        self._membership.update(**changes)
        self._dispatch()

    def expel(self, nodes: frozenset[str]) -> None:
        """From now on exactly these nodes have no part in the cluster."""
        self._membership.expel(trio.current_time(), nodes)
        self._dispatch()

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Take part until cancelled. Cancelling it is no goodbye: call `leave` before."""
        now = trio.current_time()
        self._membership.start(now)
        self._leadership.start(now)
        self._running = True
        self._network.serve(GOSSIP, self._receive)
        self._network.on_peer(self._peer_changed)
        self._network.on_vanished(self._peer_vanished)
        for peer in self._network.peers():
            self._membership.connected(peer)
        try:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._keep_persisted)
                self._dispatch()
                task_status.started()
                await self._keep_time()
        finally:
            self._running = False

    async def leave(self, timeout: float) -> None:
        """Say goodbye to all connected members; returns when they have heard it.

        One that leads first waits for another one to take over, at most `HAND_OVER_S` seconds.
        Gives up after `timeout` seconds. This node takes part in nothing afterwards.
        """
        deadline = trio.current_time() + timeout
        with trio.move_on_at(min(deadline, trio.current_time() + HAND_OVER_S)):
            await self._hand_over()
        self._membership.leave(trio.current_time())
        goodbyes = self._membership.take_outbox()
        self._dispatch()
        with trio.move_on_at(deadline):
            async with trio.open_nursery() as nursery:
                for peer, message in goodbyes:
                    nursery.start_soon(self._say_goodbye, peer, message, timeout)

    async def _hand_over(self) -> None:
        """Return when another member is known to lead instead of this one, or none ever will."""
        led = self._leadership.leads
        if not led:
            return
        self.update(leaving=True)
        while self._leadership.leader is not None and not any(
            member.live and member.record.leads > led for member in self.members.values()
        ):
            await self.wait_changed()

    async def _say_goodbye(self, peer: str, message: GossipMessage, timeout: float) -> None:
        try:
            await self._network.call(peer, GOSSIP, message, timeout=timeout)
        except NetworkError as error:
            log.debug("could not say goodbye to %s: %s", peer, error)

    async def _receive(self, peer: str, message: GossipMessage) -> None:
        if self._running:
            self._membership.receive(trio.current_time(), peer, message)
            self._dispatch()
        # Others get their turn however much a peer has sent.
        await trio.lowlevel.checkpoint()

    def _peer_changed(self, peer: str, up: bool) -> None:
        if not self._running:
            return
        if up:
            self._membership.connected(peer)
        else:
            self._membership.disconnected(trio.current_time(), peer)
        self._dispatch()

    def _peer_vanished(self, peer: str) -> None:
        if self._running:
            self._membership.vanished(trio.current_time(), peer)
            self._dispatch()

    async def _keep_time(self) -> None:
        while True:
            self._wake = trio.Event()
            with trio.move_on_at(self._next_wakeup):
                await self._wake.wait()
            now = trio.current_time()
            if now >= self._membership.next_wakeup:
                self._membership.tick(now)
            self._dispatch()

    async def _keep_persisted(self) -> None:
        failures = 0
        while True:
            again = (
                PERSIST_AGAIN_S[min(failures, len(PERSIST_AGAIN_S)) - 1] if failures else math.inf
            )
            with trio.move_on_after(again):
                await self._to_persist.wait()
            self._to_persist = trio.Event()
            failures = 0 if await self._store() else failures + 1

    async def _store(self) -> bool:
        """Say whether that went well."""
        term, stored = self._leadership.term, True
        try:
            await self._persist(self._membership.record.incarnation, term)
        except OSError as error:
            # Better to serve on with counters that a restart may have to catch up with.
            log.error("cannot store incarnation and term: %s; check the data directory", error)
            stored = False
        before, self._usable_term = self._usable_term, term
        if before < self._leadership.leads <= term:
            self._tell(TookOffice(self._leadership.leader, self._leadership.leads))
        self._dispatch()
        return stored

    def _dispatch(self) -> None:
        """Act on all that the state machines have to say. Re-entrant calls leave it to the first.

        Sending may change who is connected, and listeners may update the record.
        """
        if self._dispatching or not self._running:
            return
        self._dispatching = True
        try:
            while self._step():
                pass
        finally:
            self._dispatching = False
        self._wake.set()

    @property
    def _next_wakeup(self) -> float:
        return min(self._membership.next_wakeup, self._leadership.next_wakeup)

    def _step(self) -> bool:
        membership, leadership = self._membership, self._leadership
        events: list[GossipEvent] = [*membership.take_events()]
        now = trio.current_time()
        if events or now >= leadership.next_wakeup or self._synced != membership.synced:
            self._synced = membership.synced
            changed = {event.record.id for event in events if isinstance(event, MemberEvent)}
            events += leadership.observe(
                now,
                membership.members,
                synced=self._synced,
                changed=changed,
                most=ceiling(time.time()),
            )
        for event in events:
            self._handle(event)
        membership.update(seniority=leadership.seniority, term=leadership.term, leads=self.leads)
        for refusal in membership.take_refusals():
            self._log_refusal(now, refusal)
        outbox = membership.take_outbox()
        for peer, message in outbox:
            self._network.cast(peer, GOSSIP, message)
        return bool(events or outbox)

    def _handle(self, event: GossipEvent) -> None:
        if isinstance(event, MemberEvent):
            record = event.record
            if (
                event.kind in ("joined", "updated", "recovered")
                and record.id != self._membership.id
            ):
                self._network.learn(record.id, record.addresses)
            if event.kind == "refuted":
                self._to_persist.set()
        if isinstance(event, TookOffice):
            self._to_persist.set()
        else:
            self._tell(event)

    def _log_refusal(self, now: float, refusal: Refusal) -> None:
        if refusal.reason == "full":
            if now < self._said_full_at + _SAY_FULL_EVERY_S:
                return
            self._said_full_at = now
        level = logging.DEBUG if refusal.reason == "flood" else logging.WARNING
        log.log(level, _REFUSALS[refusal.reason], refusal.peer, refusal.node)

    def _tell(self, event: GossipEvent) -> None:
        _log_event(event)
        self._changed.set()
        self._changed = trio.Event()
        for handler in self._handlers:
            handler(event)


def _log_event(event: GossipEvent) -> None:
    match event:
        case MemberEvent(kind="updated"):
            pass
        case MemberEvent(kind=kind, record=record):
            level = logging.WARNING if kind in ("suspected", "died") else logging.INFO
            log.log(level, "%s (%s) %s", record.name, record.id, _DEEDS[kind])
        case LeaderChanged(leader=leader):
            log.info("the leader is %s", leader or "not known")
        case TookOffice(term=term):
            log.info("leading the cluster in term %d", term)
        case LeftOffice():
            log.info("no longer leading the cluster")


_REFUSALS = {
    "forged": "%s passes on news of %s that this node has not signed; ignored, now and in future",
    "full": "the cluster is at its greatest size; ignored what %s says of %s",
    "flood": "%s sends more news than is taken, the latest of %s",
}

_DEEDS = {
    "joined": "joined the cluster",
    "suspected": "does not answer",
    "recovered": "answers again",
    "died": "is gone without a goodbye",
    "left": "left the cluster",
    "dropped": "was forgotten",
    "refuted": "had to contradict a rumour about itself",
}
