"""A whole cluster in virtual time: real state machines, a made-up network, one seed.

Connections are made on demand and then carry messages with random latency (so messages overtake
each other), loss and duplication. A crash closes connections, a freeze or a loss of power only
silences them, and so does a partition until the transport gives them up. Every message is encoded,
for its size; unless the simulator is to be quick it is also decoded, for its types.
"""

import hashlib
import heapq
import random
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from typing import Any

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.leadership import LeadershipConfig
from pxd.cluster.messages import MAX_MESSAGE, GossipMessage
from pxd.cluster.records import NodeRecord
from pxd.p2p.gossip import GossipEvent
from tests.cluster.simulated_node import Disk, Process
from tests.cluster.simulated_plans import PlanMessage, Step

DIAL = 0.25
CLOSE_NOTICE = 0.05
BOOTSTRAP = 2.0
KEEPALIVE = 8.0
HEAR_OF_BAN = (0.05, 2.0)

Message = GossipMessage | PlanMessage

_encoder = msgspec.msgpack.Encoder()
_decoder: msgspec.msgpack.Decoder[GossipMessage] = msgspec.msgpack.Decoder(GossipMessage)


class Simulator:
    """`skew` is by how much of a second per second clocks may be fast or slow. `on_event` is called
    with every event of a process. `sent` and `sent_bytes` count gossip by sender, `plan_bytes` what
    plans cost."""

    def __init__(
        self,
        seed: int = 0,
        *,
        latency: tuple[float, float] = (0.001, 0.02),
        loss: float = 0.0,
        duplication: float = 0.0,
        skew: float = 0.0,
        config: MembershipConfig | None = None,
        leadership: LeadershipConfig | None = None,
        quick: bool = False,
    ) -> None:
        self.now = 0.0
        self.random = random.Random(seed)
        self.latency, self.loss, self.duplication = latency, loss, duplication
        self.skew = skew
        self.config = config or MembershipConfig()
        self.leadership = leadership or LeadershipConfig()
        self.processes: dict[str, Process] = {}
        self.disks: dict[str, Disk] = {}
        self.places: dict[str, int] = {}
        self.blocked: set[tuple[str, str]] = set()
        self.bans: set[str] = set()
        self.links: defaultdict[str, dict[str, None]] = defaultdict(dict)
        self.dialling: dict[tuple[str, str], list[tuple[str, str, Message]]] = {}
        self.sent: Counter[str] = Counter()
        self.sent_bytes: Counter[str] = Counter()
        self.plan_bytes = 0
        self.on_event: Callable[[Process, GossipEvent], None] | None = None
        self._quick = quick
        self._agenda: list[tuple[float, int, Step, tuple[Any, ...]]] = []
        self._order = 0

    # What happens to nodes

    def start(
        self, name: str, *seeds: str, keep_data: bool = True, place: int | None = None
    ) -> Process:
        """`place` is the machine, and so the address; each name has one of its own by default."""
        process = self._boot(name, seeds, keep_data=keep_data, place=place)
        process.start()
        self._bootstrap(process, seeds)
        process.drain()
        if self.bans:
            self._spread_bans()
        return process

    def cluster(self, size: int) -> list[str]:
        """Nodes that come one after the other and join through the first."""
        names = [f"n{index:03}" for index in range(size)]
        self.start(names[0])
        for name in names[1:]:
            self.run(0.05)
            self.start(name, names[0])
        return names

    def settled(self, size: int) -> list[str]:
        """Nodes that know each other already, for it takes a large cluster long to come together.

        Their ids are as long as real ones. Nobody is in office yet.
        """
        names = [_peer_id(index) for index in range(size)]
        processes = [
            self._boot(name, names[:1], keep_data=False, seniority=place)
            for place, name in enumerate(names, start=1)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.introduce(other for other in processes if other is not process)
        for process in processes:
            process.drain()
        return names

    def crash(self, name: str) -> None:
        del self.processes[name]
        for other in list(self.links[name]):
            self._close(name, other)

    def leave(self, name: str) -> None:
        process = self.processes[name]
        process.leave()
        process.drain()

    def freeze(self, name: str) -> None:
        self.processes[name].frozen = True

    def thaw(self, name: str) -> None:
        process = self.processes[name]
        process.frozen = False
        backlog, process.backlog = process.backlog, []
        for step, args in backlog:
            self._enter(process, step, *args)

    def slow_down(self, name: str, seconds: float) -> None:
        """From now on everything that this node does takes that long."""
        self.processes[name].slowness = seconds

    def expel(self, name: str) -> None:
        """Somebody kicks the node out; the others hear of it one after the other."""
        self.bans.add(name)
        self._spread_bans()

    def drop_connections(self) -> None:
        """Break every connection, though nothing keeps the nodes from making new ones."""
        for one, other in self.connections():
            self._close(one, other)

    def connections(self) -> list[tuple[str, str]]:
        return [(one, other) for one in self.links for other in self.links[one] if one < other]

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

    def after(self, delay: float, step: Step, *args: Any) -> None:
        self._at(self.now + delay, step, *args)

    def _at(self, when: float, step: Step, *args: Any) -> None:
        self._order += 1
        heapq.heappush(self._agenda, (when, self._order, step, args))

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        agenda = self._agenda
        while agenda and agenda[0][0] <= end:
            self.now, _, step, args = heapq.heappop(agenda)
            step(*args)
        self.now = end

    def run_until(self, condition: Callable[[], bool], limit: float, step: float = 0.02) -> float:
        """Run until `condition` holds; returns how long it took, or fails at `limit`."""
        started = self.now
        while not condition():
            assert self.now - started < limit, f"not within {limit} s"
            self.run(step)
        return self.now - started

    def discover(self) -> None:
        """Introduce to each other only those who could never find each other on their own."""
        names = sorted(self.processes.keys() - self.bans)
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
        running = self.processes.keys() - self.bans
        processes = [self.processes[name] for name in running]
        leaders = {process.leadership.leader for process in processes}
        return (
            len(leaders) == 1
            and leaders == set(self.in_office())
            and all(self.sees_exactly(process, running) for process in processes)
        )

    def sees_exactly(self, process: Process, running: Iterable[str]) -> bool:
        members = process.members
        if len(process.membership._table.live_others) != len(set(running)) - 1:
            return False
        return all(name in members and members[name].state == "alive" for name in running)

    def in_office(self) -> list[str]:
        return sorted(
            name
            for name, process in self.processes.items()
            if process.leadership.in_office and name not in self.bans
        )

    # The world, as processes see it

    def uniform(self, low: float, high: float) -> float:
        return self.random.uniform(low, high)

    def bits(self) -> int:
        return self.random.getrandbits(64)

    def enter_at(self, when: float, process: Process, step: Step, *args: object) -> None:
        self._at(when, self._enter, process, step, *args)

    def ring_at(self, when: float, process: Process) -> None:
        """One alarm per process: an earlier one that it no longer needs rings in vain."""
        when = max(when, self.now)
        if when < process.rings_at:
            process.rings_at = when
            self._at(when, self._ring, process, when)

    def told(self, process: Process, event: GossipEvent) -> None:
        if self.on_event is not None:
            self.on_event(process, event)

    def gone(self, process: Process) -> None:
        # The goodbyes are on their way before the connections close.
        self.after(self.latency[1], self._stop, process)

    def send(self, source: Process, target: str, message: Message) -> None:
        data = _encoder.encode(message)
        if isinstance(message, PlanMessage):
            self.plan_bytes += len(data)
        else:
            assert len(data) <= MAX_MESSAGE
            self.sent[source.name] += 1
            self.sent_bytes[source.name] += len(data)
            if not self._quick:
                message = _decoder.decode(data)
        if target in self.links[source.name]:
            self._carry(source.name, target, message)
        else:
            self._dial(source.name, target)
            self.dialling[_pair(source.name, target)].append((source.name, target, message))

    # The inside of a process: nothing happens to one that is over, and to a frozen one only later

    def _boot(
        self,
        name: str,
        seeds: Iterable[str],
        *,
        keep_data: bool,
        place: int | None = None,
        seniority: int = 0,
    ) -> Process:
        if not keep_data or name not in self.disks:
            self.disks[name] = Disk()
        if place is not None or name not in self.places:
            self.places[name] = place if place is not None else len(self.places)
        disk, number = self.disks[name], self.places[name]
        disk.incarnation += 1
        record = NodeRecord(
            id=name,
            name=name[-8:],
            incarnation=disk.incarnation,
            started=self.now,
            seniority=seniority,
            addresses=(f"/ip4/10.0.{number >> 8}.{number & 255}/tcp/4001/p2p/{name}",),
        )
        process = self.processes[name] = Process(
            self,
            record,
            disk,
            self.config,
            self.leadership,
            offset=self.uniform(0.0, 1e5) if self.skew else 0.0,
            rate=1.0 + self.uniform(-self.skew, self.skew),
            expects_peers=bool(tuple(seeds)),
        )
        if disk.banned:
            process.expel(disk.banned)
        return process

    def _enter(self, process: Process, step: Step, *args: object) -> None:
        if self.processes.get(process.name) is not process:
            return
        if process.frozen:
            process.backlog.append((step, args))
        elif process.slowness:
            process.busy_until = max(self.now, process.busy_until) + process.slowness
            self._at(process.busy_until, self._perform, process, step, args)
        else:
            step(*args)
            process.drain()

    def _perform(self, process: Process, step: Step, args: tuple[object, ...]) -> None:
        if self.processes.get(process.name) is not process:
            return
        if process.frozen:
            process.backlog.append((step, args))
        else:
            step(*args)
            process.drain()

    def _ring(self, process: Process, when: float) -> None:
        if process.rings_at == when:
            process.rings_at = float("inf")
            self._enter(process, process.ring)

    def _stop(self, process: Process) -> None:
        if self.processes.get(process.name) is process:
            self.crash(process.name)

    def _spread_bans(self) -> None:
        """Whoever is reached by somebody who knows hears of it; the first to know just does."""
        waiting = False
        for name in sorted(self.processes.keys() - self.bans):
            process = self.processes[name]
            if not self.bans <= process.disk.banned:
                knowing = [n for n, p in self.processes.items() if self.bans <= p.disk.banned]
                if not knowing or any(self._reachable(name, other) for other in knowing):
                    self._enter(process, self._ban, process, frozenset(self.bans))
                waiting = True
        if waiting:
            self.after(self.uniform(*HEAR_OF_BAN), self._spread_bans)

    def _ban(self, process: Process, banned: frozenset[str]) -> None:
        process.expel(banned)
        for name in banned & self.links[process.name].keys():
            self._close(process.name, name)

    # The network

    def _give_up_silent(self) -> None:
        for one, other in sorted(self.blocked):
            if one < other and other in self.links[one] and (other, one) in self.blocked:
                self._close(one, other)

    def _bootstrap(self, process: Process, seeds: tuple[str, ...]) -> None:
        """As the transport does: try the known addresses until one connection stands."""
        alive = self.processes.get(process.name) is process
        if alive and seeds and not self.links[process.name]:
            if not process.frozen:
                for seed in seeds:
                    self._dial(process.name, seed)
            self.after(BOOTSTRAP, self._bootstrap, process, seeds)

    def _reachable(self, one: str, other: str) -> bool:
        here, there = self.processes.get(one), self.processes.get(other)
        if here is None or there is None or {(one, other), (other, one)} & self.blocked:
            return False
        return other not in here.disk.banned and one not in there.disk.banned

    def _dial(self, source: str, target: str) -> None:
        pair = _pair(source, target)
        if target not in self.links[source] and pair not in self.dialling:
            self.dialling[pair] = []
            self.after(DIAL, self._dialled, pair)

    def _dialled(self, pair: tuple[str, str]) -> None:
        waiting = self.dialling.pop(pair)
        for here, there in (pair, pair[::-1]):
            # The machine is there, and says that the process is not.
            if here in self.processes and there not in self.processes:
                process = self.processes[here]
                if not {(here, there), (there, here)} & self.blocked:
                    self._enter(process, process.vanished, there)
        if not self._reachable(*pair) or any(self.processes[name].frozen for name in pair):
            return
        one, other = pair
        self.links[one][other] = self.links[other][one] = None
        for here, there in ((one, other), (other, one)):
            process = self.processes[here]
            self._enter(process, process.connected, there)
        for source, target, message in waiting:
            self._carry(source, target, message)

    def _carry(self, source: str, target: str, message: Message) -> None:
        receiver = self.processes.get(target)
        if receiver is None:
            return
        copies = 1 + (self.duplication > 0 and self.random.random() < self.duplication)
        for _ in range(copies):
            if self.random.random() >= self.loss:
                delay = self.uniform(*self.latency)
                self.after(delay, self._deliver, source, receiver, message)

    def _deliver(self, source: str, receiver: Process, message: Message) -> None:
        # What was sent to an earlier life of a node died with its connection.
        banned = source in receiver.disk.banned
        if not banned and (source, receiver.name) not in self.blocked:
            self._enter(receiver, receiver.receive, source, message)

    def _close(self, one: str, other: str) -> None:
        self.links[one].pop(other, None)
        self.links[other].pop(one, None)
        for name, gone in ((one, other), (other, one)):
            process = self.processes.get(name)
            if process is not None:
                self.after(CLOSE_NOTICE, self._notice, process, gone)

    def _notice(self, process: Process, gone: str) -> None:
        if gone not in self.links[process.name]:
            self._enter(process, self._disconnect, process, gone)

    def _disconnect(self, process: Process, gone: str) -> None:
        if gone not in self.links[process.name]:
            process.disconnected(gone)


def _pair(one: str, other: str) -> tuple[str, str]:
    return (one, other) if one < other else (other, one)


def _peer_id(index: int) -> str:
    """Made up, and as long as that of an Ed25519 key."""
    return "12D3KooW" + hashlib.sha256(b"%d" % index).hexdigest()[:44]
