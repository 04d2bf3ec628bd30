"""A whole cluster in virtual time: real state machines, a made-up network, one seed.

Connections are made on demand and then carry messages with random latency (so messages overtake
each other), loss and duplication. A crash closes connections, a freeze only silences them, and so
does a partition until the transport gives them up. Every message is encoded, so that its size and
types are those of the wire.
"""

import heapq
import random
from collections import Counter
from collections.abc import Callable

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.leadership import Leadership, LeadershipConfig, LeadershipEvent, TookOffice
from pxd.cluster.members import MemberEvent
from pxd.cluster.membership import Membership
from pxd.cluster.messages import MAX_MESSAGE, GossipMessage
from pxd.cluster.records import NodeRecord
from tests.signers import FakeSigner

DIAL = 0.25
CLOSE_NOTICE = 0.05
BOOTSTRAP = 2.0
KEEPALIVE = 8.0

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[GossipMessage] = msgspec.msgpack.Decoder(GossipMessage)


class Disk:
    """What survives a restart."""

    def __init__(self) -> None:
        self.incarnation = 0
        self.term = 0


class Process:
    """One life of a node."""

    def __init__(self, simulator: "Simulator", name: str, seeds: tuple[str, ...]) -> None:
        self.name = name
        self.frozen = False
        self.synced = False
        self.backlog: list[Callable[[], None]] = []
        self.events: list[tuple[float, MemberEvent | LeadershipEvent]] = []
        self.wakeup = float("inf")
        disk = simulator.disks[name]
        disk.incarnation += 1
        record = NodeRecord(id=name, name=name, incarnation=disk.incarnation, started=simulator.now)
        self.membership = Membership(
            record, simulator.config, simulator.random.getrandbits(64), FakeSigner(name)
        )
        self.leadership = Leadership(
            name, simulator.leadership, term=disk.term, expects_peers=bool(seeds)
        )

    def happened(self, kind: str, node: str | None = None) -> list[float]:
        """Times at which this process saw a member event."""
        return [
            when
            for when, event in self.events
            if isinstance(event, MemberEvent)
            and event.kind == kind
            and (node is None or event.record.id == node)
        ]

    def terms_taken(self) -> int:
        return sum(isinstance(event, TookOffice) for _, event in self.events)

    def live(self) -> set[str]:
        return {node for node, member in self.membership.members.items() if member.live}

    def knows(self, other: str) -> bool:
        """Whether it would ever try to reach that node, if only as one of the lost."""
        table = self.membership._table
        return other in table.live_others or other in table.lost()

    def states(self) -> dict[str, str]:
        return {node: member.state for node, member in self.membership.members.items()}


class Simulator:
    def __init__(
        self,
        seed: int = 0,
        *,
        latency: tuple[float, float] = (0.001, 0.02),
        loss: float = 0.0,
        duplication: float = 0.0,
        config: MembershipConfig | None = None,
        leadership: LeadershipConfig | None = None,
    ) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.latency, self.loss, self.duplication = latency, loss, duplication
        self.config = config or MembershipConfig()
        self.leadership = leadership or LeadershipConfig()
        self.processes: dict[str, Process] = {}
        self.disks: dict[str, Disk] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.connections: set[frozenset[str]] = set()
        self.dialling: dict[frozenset[str], list[tuple[str, str, bytes]]] = {}
        self.sent: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self._agenda: list[tuple[float, int, Callable[[], None]]] = []
        self._order = 0

    # What happens to nodes

    def start(self, name: str, *seeds: str, keep_data: bool = True) -> Process:
        if not keep_data or name not in self.disks:
            self.disks[name] = Disk()
        process = self.processes[name] = Process(self, name, seeds)
        process.membership.start(self.now)
        process.leadership.start(self.now)
        self._bootstrap(process, seeds)
        self._drain(process)
        return process

    def cluster(self, size: int) -> list[str]:
        names = [f"n{index:03}" for index in range(size)]
        self.start(names[0])
        for name in names[1:]:
            self.run(0.05)
            self.start(name, names[0])
        return names

    def crash(self, name: str) -> None:
        del self.processes[name]
        for pair in [pair for pair in self.connections if name in pair]:
            self._close(pair)

    def leave(self, name: str) -> None:
        process = self.processes[name]
        process.membership.leave(self.now)
        self._drain(process)
        # The goodbyes are on their way before the connections close.
        self.after(self.latency[1], lambda: self._stop(name, process))

    def freeze(self, name: str) -> None:
        self.processes[name].frozen = True

    def thaw(self, name: str) -> None:
        process = self.processes[name]
        process.frozen = False
        backlog, process.backlog = process.backlog, []
        for step in backlog:
            step()
        self._drain(process)

    def drop_connections(self) -> None:
        """Break every connection, though nothing keeps the nodes from making new ones."""
        for pair in list(self.connections):
            self._close(pair)

    def block(self, source: str, target: str) -> None:
        """Silence one direction."""
        self.blocked.add((source, target))

    def partition(self, *groups: list[str]) -> None:
        for group in groups:
            for other in groups:
                if group is not other:
                    self.blocked |= {(a, b) for a in group for b in other}
        self.after(KEEPALIVE, self._give_up_silent)

    def heal(self) -> None:
        self.blocked.clear()

    # Time

    def after(self, delay: float, step: Callable[[], None]) -> None:
        self._at(self.now + delay, step)

    def _at(self, when: float, step: Callable[[], None]) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (when, self._order, step))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        while self._agenda and self._agenda[0][0] <= end:
            self.now, _, step = heapq.heappop(self._agenda)
            step()
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit: float) -> float:
        """Run until `condition` holds; returns how long it took, or fails at `limit`."""
        started = self.now
        while not condition():
            assert self.now - started < limit, f"not within {limit} s"
            self.run(0.02)
        return self.now - started

    def discover(self) -> None:
        """Introduce to each other only those who could never find each other on their own."""
        names = sorted(self.processes)
        island = {names[0]}
        while len(island) < len(names):
            more = [
                name
                for name in names
                if name not in island
                and any(
                    self.processes[name].knows(other) or self.processes[other].knows(name)
                    for other in island
                )
            ]
            if not more:
                more = [name for name in names if name not in island][:1]
                self._dial(names[0], more[0])
            island.update(more)

    # What the nodes hold true

    def agreed(self) -> bool:
        """All running nodes see exactly each other as alive, and the same leader in office."""
        running = set(self.processes)
        leaders = {process.leadership.leader for process in self.processes.values()}
        return (
            all(process.live() == running for process in self.processes.values())
            and all(
                member.state == "alive"
                for process in self.processes.values()
                for node, member in process.membership.members.items()
                if node in running
            )
            and len(leaders) == 1
            and leaders == set(self.in_office())
        )

    def in_office(self) -> list[str]:
        return sorted(
            name for name, process in self.processes.items() if process.leadership.in_office
        )

    # The driver, as `pxd.p2p.gossip` does it

    def _drain(self, process: Process) -> None:
        membership, leadership = process.membership, process.leadership
        disk = self.disks[process.name]
        while (events := membership.take_events()) or self._leadership_is_due(process):
            process.synced = membership.synced
            conclusions = leadership.observe(self.now, membership.members, synced=membership.synced)
            process.events.extend((self.now, event) for event in (*events, *conclusions))
            disk.incarnation = max(disk.incarnation, membership.record.incarnation)
            if any(isinstance(event, TookOffice) for event in conclusions):
                disk.term = leadership.term
            membership.update(
                seniority=leadership.seniority, term=leadership.term, leads=leadership.leads
            )
        for peer, message in membership.take_outbox():
            self._send(process.name, peer, message)
        self._schedule(process)

    def _leadership_is_due(self, process: Process) -> bool:
        return (
            self.now >= process.leadership.next_wakeup
            or process.synced != process.membership.synced
        )

    def _schedule(self, process: Process) -> None:
        wakeup = min(process.membership.next_wakeup, process.leadership.next_wakeup)
        if wakeup != process.wakeup:
            process.wakeup = wakeup
            if wakeup != float("inf"):
                self._at(max(self.now, wakeup), lambda: self._tick(process, wakeup))

    def _tick(self, process: Process, wakeup: float) -> None:
        if self.processes.get(process.name) is not process or process.wakeup != wakeup:
            return
        if process.frozen:
            process.backlog.append(lambda: self._tick(process, wakeup))
            return
        process.wakeup = float("inf")
        if self.now >= process.membership.next_wakeup:
            process.membership.tick(self.now)
        self._drain(process)

    # The network

    def _give_up_silent(self) -> None:
        for pair in list(self.connections):
            one, other = pair
            if {(one, other), (other, one)} <= self.blocked:
                self._close(pair)

    def _bootstrap(self, process: Process, seeds: tuple[str, ...]) -> None:
        """As the transport does: try the known addresses until one connection stands."""
        alive = self.processes.get(process.name) is process
        if alive and seeds and not any(process.name in pair for pair in self.connections):
            if not process.frozen:
                for seed in seeds:
                    self._dial(process.name, seed)
            self.after(BOOTSTRAP, lambda: self._bootstrap(process, seeds))

    def _reachable(self, one: str, other: str) -> bool:
        return (
            one in self.processes
            and other in self.processes
            and not self.blocked & {(one, other), (other, one)}
        )

    def _send(self, source: str, target: str, message: GossipMessage) -> None:
        data = _encoder.encode(message)
        assert len(data) <= MAX_MESSAGE
        self.sent[source] += 1
        self.sent_bytes[source] += len(data)
        pair = frozenset((source, target))
        if pair in self.connections:
            self._carry(source, target, data)
        elif pair in self.dialling:
            self.dialling[pair].append((source, target, data))
        else:
            self._dial(source, target)
            self.dialling[pair].append((source, target, data))

    def _dial(self, source: str, target: str) -> None:
        pair = frozenset((source, target))
        if pair not in self.connections and pair not in self.dialling:
            self.dialling[pair] = []
            self.after(DIAL, lambda: self._dialled(pair))

    def _dialled(self, pair: frozenset[str]) -> None:
        waiting = self.dialling.pop(pair)
        one, other = sorted(pair)
        if not self._reachable(one, other) or any(self.processes[n].frozen for n in pair):
            return
        self.connections.add(pair)
        for here, there in ((one, other), (other, one)):
            process = self.processes[here]
            process.membership.connected(there)
            self._drain(process)
        for source, target, data in waiting:
            self._carry(source, target, data)

    def _carry(self, source: str, target: str, data: bytes) -> None:
        copies = 1 + (self.random.random() < self.duplication)
        for _ in range(copies):
            if self.random.random() >= self.loss:
                receiver = self.processes.get(target)
                delay = self.random.uniform(*self.latency)
                self.after(delay, lambda life=receiver: self._deliver(source, life, target, data))

    def _deliver(self, source: str, life: Process | None, target: str, data: bytes) -> None:
        process = self.processes.get(target)
        # What was sent to an earlier life of a node died with its connection.
        if process is None or process is not life or (source, target) in self.blocked:
            return
        if process.frozen:
            process.backlog.append(lambda: self._deliver(source, life, target, data))
            return
        process.membership.receive(self.now, source, _decoder.decode(data))
        self._drain(process)

    def _stop(self, name: str, process: Process) -> None:
        if self.processes.get(name) is process:
            self.crash(name)

    def _close(self, pair: frozenset[str]) -> None:
        self.connections.discard(pair)
        for name in pair & self.processes.keys():
            (other,) = pair - {name}
            life = self.processes[name]
            self.after(CLOSE_NOTICE, lambda n=name, o=other, p=life: self._notice(n, o, p))

    def _notice(self, name: str, other: str, life: Process) -> None:
        process = self.processes.get(name)
        if process is None or process is not life or frozenset((name, other)) in self.connections:
            return
        if process.frozen:
            process.backlog.append(lambda: self._notice(name, other, life))
            return
        process.membership.disconnected(self.now, other)
        self._drain(process)
