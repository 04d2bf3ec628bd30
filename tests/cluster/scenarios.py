"""What is measured of simulated clusters of one size after the other: `scripts/simulate`."""

import math
import random
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import msgspec

from pxd.cluster.leadership import TookOffice
from pxd.cluster.members import MemberEvent
from pxd.p2p.gossip import GossipEvent
from tests.cluster.simulated_node import Process
from tests.cluster.simulator import Simulator

SKEW = 0.001
SETTLE_LIMIT = 60.0
DEATH_LIMIT = 120.0
RESTART_LIMIT = 600.0
DOWN = (0.5, 3.0)
MEMBERLIST_SUSPICION_MULT = 4
MEMBERLIST_PROBE_INTERVAL = 1.0

Progress = Callable[[str], None]


def memberlist_suspicion(nodes: int) -> float:
    """Seconds that memberlist at its LAN defaults leaves a suspect when enough others confirm:
    `suspicionTimeout` in its util.go, SuspicionMult * max(1, log10(N)) * ProbeInterval. Without
    confirmations it is six times that; the time to be probed and to spread the news comes on top.
    """
    scale = max(1.0, math.log10(max(1, nodes)))
    return MEMBERLIST_SUSPICION_MULT * scale * MEMBERLIST_PROBE_INTERVAL


class Death(msgspec.Struct, frozen=True):
    """Seconds from a node's end: to the first suspicion, to the first who holds it dead, and until
    everybody does."""

    suspected_s: float
    first_s: float
    everywhere_s: float


class Traffic(msgspec.Struct, frozen=True):
    """Gossip sent per node and second, on average and by the node that sends most."""

    seconds: float
    messages: float
    bytes: float
    busiest_messages: float
    busiest_bytes: float


class Measured(msgspec.Struct, frozen=True):
    """One cluster. `power_loss` is a node that falls silent, `crash` one whose connections close.

    `false_suspicions` in the quiet time and `false_deaths` in all of it are of nodes that were
    there; `restart_s` is from the start of the last of 10 % restarting nodes until all agree again.
    """

    nodes: int
    loss: float
    seed: int
    quiet_s: float
    quiet: Traffic
    power_loss: Death
    crash: Death
    memberlist_s: float
    false_suspicions: int
    false_deaths: int
    restarted: int
    restart_s: float
    restart: Traffic
    offices: int

    @property
    def restart_kb(self) -> float:
        """Kilobytes that a node sends for each that restarts."""
        return self.restart.bytes * self.restart.seconds / self.restarted / 1000

    @property
    def false_suspicions_per_hour(self) -> float:
        """How many a node harbours in an hour."""
        return self.false_suspicions / self.nodes / self.quiet_s * 3600


class Scenario:
    """A cluster that knows itself already, and somebody who takes notes."""

    def __init__(self, nodes: int, *, loss: float, seed: int) -> None:
        self.simulator = Simulator(seed, loss=loss, skew=SKEW, quick=True)
        self.simulator.on_event = self._note
        self.dice = random.Random(f"scenario {seed}")
        self.false_suspicions = self.false_deaths = self.offices = 0
        self._suspected: dict[str, float] = {}
        self._deaths: defaultdict[str, dict[str, float]] = defaultdict(dict)
        self._down: set[str] = set()
        self.names = self.simulator.settled(nodes)

    def settle(self) -> None:
        """Wait for a leader in office and one plan."""
        simulator = self.simulator

        def one_plan() -> bool:
            epochs = {process.plans.epoch for process in self._running()}
            return len(epochs) == 1 and None not in epochs and simulator.agreed()

        simulator.run_until(one_plan, SETTLE_LIMIT, step=0.5)

    def traffic(self, seconds: float) -> Traffic:
        """Let that much time pass and say what it cost."""
        with self._metered() as result:
            self.simulator.run(seconds)
        return result()

    def lose_power(self) -> Death:
        """A node falls silent; nobody's connection to it closes."""
        return self._die(self.simulator.freeze)

    def crash(self) -> Death:
        return self._die(self.simulator.crash)

    def restart(self, share: float = 0.1) -> tuple[int, float, Traffic]:
        """So many nodes go at once and are back seconds later: how many they were, how long it
        took from the last one's start until all know all of them again, and what it cost."""
        simulator, last = self.simulator, 0.0
        victims = self.dice.sample(sorted(self._alive()), max(1, round(share * len(self.names))))
        rest = sorted(self._alive() - set(victims))
        self._down |= set(victims)
        for name in victims:
            simulator.crash(name)
            away = self.dice.uniform(*DOWN)
            last = max(last, simulator.now + away)
            simulator.after(away, self._start, name, self.dice.sample(rest, 1))
        with self._metered() as result:
            simulator.run(last - simulator.now)
            took = simulator.run_until(lambda: self._all_know(victims), RESTART_LIMIT, step=0.2)
            traffic = result()
        return len(victims), took, traffic

    def _start(self, name: str, seeds: list[str]) -> None:
        self._down.discard(name)
        self.simulator.start(name, *seeds)

    def _die(self, end: Callable[[str], None]) -> Death:
        leaders = set(self.simulator.in_office())
        victim = self.dice.choice(sorted(self._alive() - leaders))
        began = self.simulator.now
        self._down.add(victim)
        self._deaths.pop(victim, None)
        self._suspected.pop(victim, None)
        end(victim)
        others = self._alive()
        deaths = self._deaths[victim]
        self.simulator.run_until(lambda: len(deaths) == len(others), DEATH_LIMIT, step=0.1)
        suspected, first, last = self._suspected[victim], min(deaths.values()), max(deaths.values())
        return Death(suspected - began, first - began, last - began)

    def _alive(self) -> set[str]:
        return self.simulator.processes.keys() - self._down

    def _running(self) -> list[Process]:
        return [self.simulator.processes[name] for name in sorted(self._alive())]

    def _all_know(self, restarted: list[str]) -> bool:
        """All running nodes see each other alive, the restarted ones in their present life."""
        running = self._running()
        names = {process.name for process in running}
        lives = {name: self.simulator.disks[name].incarnation for name in restarted}
        return len({process.leadership.leader for process in running}) == 1 and all(
            self.simulator.sees_exactly(process, names)
            and all(process.members[name].incarnation >= life for name, life in lives.items())
            for process in running
        )

    @contextmanager
    def _metered(self) -> Iterator[Callable[[], Traffic]]:
        simulator = self.simulator
        simulator.sent.clear()
        simulator.sent_bytes.clear()
        began = simulator.now

        def result() -> Traffic:
            seconds, nodes = simulator.now - began, len(self.names)
            return Traffic(
                seconds,
                simulator.sent.total() / seconds / nodes,
                simulator.sent_bytes.total() / seconds / nodes,
                max(simulator.sent.values(), default=0) / seconds,
                max(simulator.sent_bytes.values(), default=0) / seconds,
            )

        yield result

    def _note(self, process: Process, event: GossipEvent) -> None:
        if isinstance(event, TookOffice):
            self.offices += 1
        if not isinstance(event, MemberEvent) or event.kind not in ("suspected", "died"):
            return
        node, now = event.record.id, self.simulator.now
        false = node not in self._down
        if event.kind == "suspected":
            self._suspected.setdefault(node, now)
            self.false_suspicions += false
        else:
            self._deaths[node].setdefault(process.name, now)
            self.false_deaths += false


def measure(nodes: int, *, loss: float, seed: int, quiet_s: float, say: Progress) -> Measured:
    """Everything about a cluster of that size; AssertionError if it does not settle in time."""
    say(f"{nodes} nodes: coming together")
    scenario = Scenario(nodes, loss=loss, seed=seed)
    scenario.settle()
    say(f"{nodes} nodes: {quiet_s:.0f} s without a fault")
    quiet = scenario.traffic(quiet_s)
    false_suspicions = scenario.false_suspicions
    say(f"{nodes} nodes: one loses power")
    power_loss = scenario.lose_power()
    say(f"{nodes} nodes: one crashes")
    crash = scenario.crash()
    say(f"{nodes} nodes: a tenth restarts")
    restarted, restart_s, restart = scenario.restart()
    return Measured(
        nodes=nodes,
        loss=loss,
        seed=seed,
        quiet_s=quiet_s,
        quiet=quiet,
        power_loss=power_loss,
        crash=crash,
        memberlist_s=memberlist_suspicion(nodes),
        false_suspicions=false_suspicions,
        false_deaths=scenario.false_deaths,
        restarted=restarted,
        restart_s=restart_s,
        restart=restart,
        offices=scenario.offices,
    )
