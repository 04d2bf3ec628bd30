"""Random schedules of faults on three to nine nodes, and what must hold in the quiet after each."""

import random
from collections.abc import Callable

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.plans import Epoch
from tests.cluster.simulated_node import Process
from tests.cluster.simulated_plans import STAGES
from tests.cluster.simulator import Simulator

QUIET_LIMIT = 120.0
"""Seconds after the last fault within which everybody has to agree."""
GRACE = 5.0
DROP_AFTER = 20.0


class Outcome(msgspec.Struct, frozen=True):
    """`settled_s` is how long after the last fault all agreed; `failure` says what did not hold."""

    seed: int
    steps: tuple[str, ...]
    settled_s: float
    failure: str


class Schedule:
    """One seed's faults. `steps` tells them in words."""

    def __init__(self, seed: int) -> None:
        self._dice = random.Random(f"schedule {seed}")
        dice = self._dice
        self.simulator = Simulator(
            seed,
            latency=(0.001, dice.choice([0.01, 0.1, 0.4])),
            loss=dice.choice([0.0, 0.0, 0.05, 0.3]),
            duplication=dice.choice([0.0, 0.1]),
            skew=dice.choice([0.0, 0.02]),
            # The gone are dropped soon enough for that to happen between faults, too.
            config=MembershipConfig(drop_after=DROP_AFTER),
        )
        self.steps: list[str] = []
        self._late = 0
        self._retired: set[str] = set()
        size = dice.randint(3, 9)
        self._step(f"{size} nodes")
        self.simulator.cluster(size)

    def run(self) -> None:
        self._pass(8.0)
        for _ in range(self._dice.randint(3, 12)):
            action, _ = self._dice.choices(_ACTIONS, [weight for _, weight in _ACTIONS])[0]
            action(self)
            self._pass(self._dice.choice([0.1, 1.0, 3.0, 10.0, 40.0]))

    def quiet(self) -> float:
        """End every fault; returns how long it took until all agreed. AssertionError if not."""
        simulator = self.simulator
        simulator.heal()
        simulator.loss = simulator.duplication = 0.0
        for name in sorted(simulator.processes):
            simulator.slow_down(name, 0.0)
            if simulator.processes[name].frozen:
                simulator.thaw(name)
        # A slow node's old work is as much of a fault as its slowness.
        caught_up = max((p.busy_until for p in simulator.processes.values()), default=0.0)
        simulator.run(max(0.0, caught_up - simulator.now) + GRACE)
        if not self._running():
            simulator.start("last")
        simulator.discover()
        took = simulator.run_until(lambda: not self.flaw(), QUIET_LIMIT, step=0.25)
        office = self._office()
        simulator.run(DROP_AFTER + 2 * GRACE)
        assert not self.flaw(), f"agreed, and then {self.flaw()}"
        assert self._office() == office, f"{office} gave way to {self._office()} without a fault"
        self._check_nothing_is_left()
        return GRACE + took

    def flaw(self) -> str:
        """In what respect there is not exactly one leader, one view and one epoch; empty if so."""
        running = self._running()
        names = {process.name for process in running}
        leaders = self.simulator.in_office()
        if len(leaders) != 1 or {process.leadership.leader for process in running} != {*leaders}:
            followed = {p.name: p.leadership.leader for p in running}
            return f"{leaders} are in office, followed are {followed}"
        terms = {process.leadership.term for process in running}
        led = self.simulator.processes[leaders[0]].leadership.leads
        if terms != {led}:
            return f"{leaders} leads in term {led}, known are {sorted(terms)}"
        for process in running:
            if not self.simulator.sees_exactly(process, names):
                return f"{process.name} sees {process.states()}, running are {sorted(names)}"
        epochs = {process.plans.epoch for process in running}
        if len(epochs) != 1 or None in epochs:
            return f"epochs are { ({p.name: p.plans.epoch for p in running}) }"
        [plan] = {process.plans.plan for process in running}
        if plan.epoch.term == led and plan.epoch.leader != leaders[0]:
            return f"{leaders} leads in term {led}, in which {plan.epoch.leader} has planned"
        planned = {stage.node for stage in plan.models[0].pipelines[0].stages}
        if not planned <= names or len(planned) < min(STAGES, len(names)):
            return f"the plan needs {sorted(planned)}, running are {sorted(names)}"
        return ""

    def _check_nothing_is_left(self) -> None:
        """Nobody remembers who is gone, and all hold what each node says of itself now."""
        running = self._running()
        records = {process.name: process.membership.record for process in running}
        for process in running:
            held = {name: member.record for name, member in process.members.items()}
            assert held == records, f"{process.name} holds {sorted(held)}: {_differ(held, records)}"

    def _office(self) -> tuple[list[str], set[int], set[Epoch | None]]:
        running = self._running()
        return (
            self.simulator.in_office(),
            {process.leadership.term for process in running},
            {process.plans.epoch for process in running},
        )

    def _running(self) -> list[Process]:
        simulator = self.simulator
        return [simulator.processes[n] for n in sorted(simulator.processes.keys() - simulator.bans)]

    def _step(self, words: str) -> None:
        self.steps.append(f"{self.simulator.now:.2f} {words}")

    def _pass(self, longest: float) -> None:
        self.simulator.run(self._dice.uniform(0.0, longest))

    def _pick(self) -> str | None:
        running = [process.name for process in self._running()]
        return self._dice.choice(running) if running else None

    def _pick_spare(self) -> str | None:
        """Somebody who is not the last one."""
        return self._pick() if len(self._running()) > 1 else None

    # The faults

    def crash(self) -> None:
        if name := self._pick_spare():
            self._step(f"{name} crashes")
            self.simulator.crash(name)

    def leave(self) -> None:
        name = self._pick_spare()
        if name and not self.simulator.processes[name].frozen:
            self._step(f"{name} leaves")
            self.simulator.leave(name)

    def restart(self) -> None:
        simulator = self.simulator
        gone = sorted(
            simulator.disks.keys() - simulator.processes.keys() - simulator.bans - self._retired
        )
        seeds = [process.name for process in self._running()]
        if not gone:
            return
        name = self._dice.choice(gone)
        kind = self._dice.choice(["with its data", "with its key alone", "as a new node"])
        self._step(f"{name} starts {kind}")
        if kind == "as a new node":
            self._retired.add(name)
            simulator.start(f"{name}x", *seeds, place=simulator.places[name])
        else:
            simulator.start(name, *seeds, keep_data=kind == "with its data")

    def bounce(self) -> None:
        """Down and up again, sooner than anybody takes note of."""
        if name := self._pick_spare():
            keep = self._dice.random() < 0.7
            self._step(f"{name} restarts {'with' if keep else 'without'} its data")
            self.simulator.crash(name)
            self._pass(1.0)
            seeds = [process.name for process in self._running()]
            self.simulator.start(name, *seeds, keep_data=keep)

    def join(self) -> None:
        if len(self._running()) < 9 and (seed := self._pick()):
            self._late += 1
            self._step(f"late{self._late} joins through {seed}")
            self.simulator.start(f"late{self._late}", seed)

    def freeze(self) -> None:
        if name := self._pick():
            self._step(f"{name} freezes")
            self.simulator.freeze(name)

    def thaw(self) -> None:
        frozen = [process.name for process in self._running() if process.frozen]
        if frozen:
            name = self._dice.choice(frozen)
            self._step(f"{name} thaws")
            self.simulator.thaw(name)

    def slow(self) -> None:
        if name := self._pick():
            seconds = self._dice.choice([0.0, 0.02, 0.1, 0.3])
            self._step(f"{name} takes {seconds} s for everything")
            self.simulator.slow_down(name, seconds)

    def split(self) -> None:
        names = [process.name for process in self._running()]
        some = [name for name in names if self._dice.random() < 0.5]
        rest = [name for name in names if name not in some]
        if self._dice.random() < 0.5:
            self._step(f"{some} and {rest} part")
            self.simulator.partition(some, rest)
        else:
            self._step(f"{rest} no longer hear {some}")
            for name in some:
                for other in rest:
                    self.simulator.block(name, other)

    def heal(self) -> None:
        self._step("the network heals")
        self.simulator.heal()

    def noise(self) -> None:
        self.simulator.loss = self._dice.choice([0.0, 0.05, 0.3, 0.6])
        self.simulator.duplication = self._dice.choice([0.0, 0.2])
        self._step(f"loss is {self.simulator.loss}, duplication {self.simulator.duplication}")

    def cut(self) -> None:
        self._step("all connections break")
        self.simulator.drop_connections()

    def expel(self) -> None:
        if len(self._running()) > 2 and (name := self._pick()):
            self._step(f"{name} is kicked")
            self.simulator.expel(name)

    def prefer(self) -> None:
        name = self._pick()
        if name and not self.simulator.processes[name].frozen:
            priority = self._dice.choice([-1, 0, 1, 2])
            self._step(f"{name} has priority {priority}")
            process = self.simulator.processes[name]
            process.update(priority=priority)
            process.drain()


_ACTIONS: list[tuple[Callable[[Schedule], None], int]] = [
    (Schedule.crash, 4),
    (Schedule.leave, 2),
    (Schedule.restart, 5),
    (Schedule.bounce, 3),
    (Schedule.join, 1),
    (Schedule.freeze, 3),
    (Schedule.thaw, 3),
    (Schedule.slow, 2),
    (Schedule.split, 4),
    (Schedule.heal, 3),
    (Schedule.noise, 2),
    (Schedule.cut, 1),
    (Schedule.expel, 1),
    (Schedule.prefer, 2),
]


def try_schedule(seed: int) -> Outcome:
    """Run one seed's schedule to its end. Never raises: whatever goes wrong is the `failure`."""
    schedule = Schedule(seed)
    settled, failure = float("nan"), ""
    try:
        schedule.run()
        settled = schedule.quiet()
    except AssertionError as error:
        failure = f"{error}; {schedule.flaw()}"
    except Exception as error:  # noqa: BLE001 - a state machine that raises is a finding like others
        failure = f"{type(error).__name__}: {error}"
    return Outcome(seed, tuple(schedule.steps), settled, failure)


def _differ(held: dict[str, object], records: dict[str, object]) -> str:
    return "; ".join(
        f"{name}: {held.get(name)} instead of {records.get(name)}"
        for name in sorted(held.keys() | records.keys())
        if held.get(name) != records.get(name)
    )
