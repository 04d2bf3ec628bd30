"""Who is probed when, and which probes are under way. Decides nothing about members."""

import math
from collections.abc import Collection

from pxd.cluster.config import MembershipConfig
from pxd.cluster.prng import SplitMix64

_MAX_RELAYS = 1024


class Probe:
    """A question whether `target` is there. `indirect_at` is infinite once others were asked."""

    def __init__(
        self, target: str, sent: float, indirect_at: float, deadline: float, timed: bool
    ) -> None:
        self.target = target
        self.sent = sent
        self.indirect_at = indirect_at
        self.deadline = deadline
        self.timed = timed
        self.helpers: frozenset[str] = frozenset()


class _Relay:
    def __init__(self, target: str, requester: str, seq: int, deadline: float) -> None:
        self.target = target
        self.requester = requester
        self.seq = seq
        self.deadline = deadline


class Prober:
    """Round robin over a shuffled list, so that every member is probed within a bounded time."""

    def __init__(self, config: MembershipConfig, random: SplitMix64) -> None:
        self._config = config
        self._random = random
        self._order: list[str] = []
        self._position = 0
        self._seq = 0
        self._probes: dict[int, Probe] = {}
        self._relays: dict[int, _Relay] = {}

    def admit(self, node: str) -> None:
        """Give a new member a random place in the current round."""
        rest = len(self._order) - self._position
        self._order.insert(self._position + self._random.below(rest + 1), node)

    def next_target(self, candidates: Collection[str]) -> str | None:
        busy = {probe.target for probe in self._probes.values()}
        free = [node for node in candidates if node not in busy]
        if not free:
            return None
        wanted = set(free)
        while True:
            for position in range(self._position, len(self._order)):
                if self._order[position] in wanted:
                    self._position = position + 1
                    return self._order[position]
            self._order = self._random.sample(sorted(candidates), len(candidates))
            self._position = 0

    def begin(self, now: float, target: str, *, timed: bool) -> int:
        """A regular probe; returns the sequence number for its ping."""
        config = self._config
        return self._add(
            Probe(target, now, now + config.probe_timeout, now + config.probe_interval, timed)
        )

    def begin_urgent(self, now: float, target: str) -> int:
        """A probe of somebody whose connection is gone: others are to be asked at once."""
        return self._add(Probe(target, now, now, now + self._config.lost_timeout, timed=False))

    def relay(self, now: float, target: str, requester: str, seq: int) -> int | None:
        """Remember whom an ack is for; None when there are too many such requests already."""
        if len(self._relays) >= _MAX_RELAYS:
            return None
        self._seq += 1
        deadline = now + self._config.probe_interval
        self._relays[self._seq] = _Relay(target, requester, seq, deadline)
        return self._seq

    def acknowledge(self, peer: str, seq: int) -> Probe | None:
        """The probe that an ack from `peer` answers; every probe of that target ends with it."""
        probe = self._probes.get(seq)
        if probe is None or (peer != probe.target and peer not in probe.helpers):
            return None
        self.forget(probe.target)
        return probe

    def relayed(self, peer: str, seq: int) -> tuple[str, int] | None:
        """For the ack of a relayed ping: who asked for it, and under which number."""
        relay = self._relays.get(seq)
        if relay is None or relay.target != peer:
            return None
        del self._relays[seq]
        return relay.requester, relay.seq

    def forget(self, target: str) -> None:
        for seq in [s for s, probe in self._probes.items() if probe.target == target]:
            del self._probes[seq]

    def due_indirect(self, now: float) -> list[tuple[int, Probe]]:
        """Probes for which others are to be asked now; each is returned once."""
        due = [(seq, probe) for seq, probe in self._probes.items() if probe.indirect_at <= now]
        for _, probe in due:
            probe.indirect_at = math.inf
        return due

    def take_failed(self, now: float) -> list[str]:
        """Targets whose probe ended without an ack. Forgets relays that came to nothing."""
        for seq in [s for s, relay in self._relays.items() if relay.deadline <= now]:
            del self._relays[seq]
        failed = {probe.target: None for probe in self._probes.values() if probe.deadline <= now}
        for target in failed:
            self.forget(target)
        return list(failed)

    def postpone(self, seconds: float) -> None:
        """Push every deadline back, after a time in which this node could not hear answers."""
        for probe in self._probes.values():
            probe.indirect_at += seconds
            probe.deadline += seconds

    @property
    def next_wakeup(self) -> float:
        return min(
            (min(probe.indirect_at, probe.deadline) for probe in self._probes.values()),
            default=math.inf,
        )

    def _add(self, probe: Probe) -> int:
        self._seq += 1
        self._probes[self._seq] = probe
        return self._seq
