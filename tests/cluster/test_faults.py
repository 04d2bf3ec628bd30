"""Any mixture of faults: what must hold during it, and that everybody agrees after it."""

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from pxd.cluster.members import MemberEvent
from tests.cluster.simulator import Process, Simulator

MAX_NODES = 7


class ClusterUnderFaults(RuleBasedStateMachine):
    @initialize(seed=st.integers(0, 2**32), size=st.integers(2, 5), lossy=st.booleans())
    def begin(self, seed: int, size: int, lossy: bool) -> None:
        loss = 0.1 if lossy else 0.0
        self.simulator = Simulator(seed, latency=(0.001, 0.1), loss=loss, duplication=loss)
        self.names = self.simulator.cluster(size)
        self.gone: list[str] = []
        self.simulator.run(3)

    def running(self) -> list[str]:
        return sorted(self.simulator.processes)

    def pick(self, index: int) -> str:
        return self.running()[index % len(self.running())]

    @rule(seconds=st.sampled_from([0.3, 2.0, 10.0, 80.0]))
    def time_passes(self, seconds: float) -> None:
        self.simulator.run(seconds)

    @precondition(lambda self: len(self.names) < MAX_NODES)
    @rule(index=st.integers(0, 9))
    def somebody_joins(self, index: int) -> None:
        name = f"late{len(self.names)}"
        self.simulator.start(name, self.pick(index))
        self.names.append(name)

    @precondition(lambda self: len(self.running()) > 1)
    @rule(index=st.integers(0, 9), politely=st.booleans())
    def somebody_goes(self, index: int, politely: bool) -> None:
        name = self.pick(index)
        self.gone.append(name)
        if politely and not self.simulator.processes[name].frozen:
            self.simulator.leave(name)
            self.simulator.run(1.5)
        else:
            self.simulator.crash(name)

    @precondition(lambda self: self.gone)
    @rule(index=st.integers(0, 9), keep_data=st.booleans())
    def somebody_returns(self, index: int, keep_data: bool) -> None:
        name = self.gone.pop(index % len(self.gone))
        self.simulator.start(name, *self.running(), keep_data=keep_data)

    @rule(index=st.integers(0, 9))
    def somebody_freezes(self, index: int) -> None:
        self.simulator.freeze(self.pick(index))

    @rule()
    def all_thaw(self) -> None:
        for name in self.running():
            if self.simulator.processes[name].frozen:
                self.simulator.thaw(name)

    @rule(mask=st.integers(1, 2**MAX_NODES - 1), both_ways=st.booleans())
    def the_network_splits(self, mask: int, both_ways: bool) -> None:
        some = [name for i, name in enumerate(self.names) if mask >> i & 1]
        others = [name for name in self.names if name not in some]
        if both_ways:
            self.simulator.partition(some, others)
        else:
            for name in some:
                for other in others:
                    self.simulator.block(name, other)

    @rule()
    def the_network_heals(self) -> None:
        self.simulator.heal()

    @invariant()
    def views_are_sane(self) -> None:
        if not hasattr(self, "simulator"):
            return
        for name, process in self.simulator.processes.items():
            assert process.membership.members[name].state == "alive"
            check_history(name, process)
            assert process.leadership.leads in (0, *range(process.leadership.term + 1))

    def teardown(self) -> None:
        if not hasattr(self, "simulator"):
            return
        simulator = self.simulator
        simulator.heal()
        simulator.loss = simulator.duplication = 0.0
        self.all_thaw()
        simulator.run(5)
        simulator.discover()
        simulator.run_until(simulator.agreed, 120)
        simulator.run(80)
        assert simulator.agreed()
        running = set(self.running())
        for process in simulator.processes.values():
            assert set(process.states()) == running
            for name in running:
                record = simulator.processes[name].membership.record
                assert process.membership.members[name].record == record


def check_history(observer: str, process: Process) -> None:
    """Per subject: joined, then changes with growing order, then gone, then perhaps dropped."""
    present: dict[str, tuple[int, int]] = {}
    gone: set[str] = set()
    for _, event in process.events:
        if not isinstance(event, MemberEvent) or event.record.id == observer:
            continue
        subject, order = event.record.id, event.record.order
        if event.kind == "joined":
            assert subject not in present
            present[subject] = order
            gone.discard(subject)
        elif event.kind == "dropped":
            assert subject in gone
            gone.remove(subject)
        else:
            assert order >= present[subject]
            present[subject] = order
            if event.kind in ("died", "left"):
                del present[subject]
                gone.add(subject)


ClusterUnderFaults.TestCase.settings = settings(
    max_examples=30, stateful_step_count=12, deadline=None
)
TestClusterUnderFaults = ClusterUnderFaults.TestCase
