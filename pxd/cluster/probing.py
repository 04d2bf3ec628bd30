"""Who is probed when, and which probes are under way. Decides nothing about members."""

import math
from collections import Counter
from collections.abc import Collection, Iterable

from pxd.cluster.awareness import Awareness
from pxd.cluster.config import MembershipConfig
from pxd.cluster.prng import SplitMix64

_MAX_RELAYS = 1024
_MAX_RELAYS_PER_PEER = 64
_SLACK = 64
_MOST_AT_ONCE = 32


class Probe:
    """A question whether `target` is there. `indirect_at` is infinite once others were asked.

    Of `helpers` those in `expected` can be reached, so that each should say at least that it has
    heard nothing. An `urgent` probe asks whether a node is gone with its connection.
    """

    def __init__(
        self,
        target: str,
        sent: float,
        indirect_at: float,
        deadline: float,
        *,
        timed: bool = False,
        urgent: bool = False,
    ) -> None:
        self.target = target
        self.sent = sent
        self.indirect_at = indirect_at
        self.deadline = deadline
        self.timed = timed
        self.urgent = urgent
        self.helpers: frozenset[str] = frozenset()
        self.expected: set[str] = set()

    @property
    def blame(self) -> int:
        """How far its failure is more likely this node's own fault than the target's."""
        if self.urgent:
            return 0
        return len(self.expected) if self.helpers else 1


class _Relay:
    def __init__(self, target: str, requester: str, seq: int, deadline: float) -> None:
        self.target = target
        self.requester = requester
        self.seq = seq
        self.deadline = deadline


class Prober:
    """Round robin over a shuffled list, so that every member is probed within a bounded time.

    Times grow with `awareness`, which follows the outcome of the probes. `width` is how many to
    begin at once: one, but more while many turn out not to be there, so that many who are gone, or
    never were, do not stay listed for as long as it takes to probe one after the other.
    """

    def __init__(self, config: MembershipConfig, random: SplitMix64, awareness: Awareness) -> None:
        self._config = config
        self._random = random
        self._awareness = awareness
        self.width = 1
        self._order: list[str] = []
        self._position = 0
        self._seq = 0
        self._probes: dict[int, Probe] = {}
        # Both in order of time, since all wait equally long.
        self._relays: dict[int, _Relay] = {}
        self._nacks: dict[int, float] = {}
        self._relayed_for: Counter[str] = Counter()

    def admit(self, node: str) -> None:
        """Give a new member a random place in the current round."""
        rest = len(self._order) - self._position
        self._order.insert(self._position + self._random.below(rest + 1), node)

    def next_target(self, candidates: Collection[str]) -> str | None:
        """`candidates` are to be such that looking for one in them is quick."""
        busy = {probe.target for probe in self._probes.values()}
        if len(busy) >= len(candidates) and busy.issuperset(candidates):
            return None
        while True:
            # Members that come and go must not make a round longer and longer.
            if len(self._order) <= 2 * len(candidates) + _SLACK:
                for position in range(self._position, len(self._order)):
                    node = self._order[position]
                    if node in candidates and node not in busy:
                        self._position = position + 1
                        return node
            self._order = self._random.sample(sorted(candidates), len(candidates))
            self._position = 0

    def begin(self, now: float, target: str, *, timed: bool) -> int:
        """A regular probe; returns the sequence number for its ping."""
        config, scale = self._config, self._awareness.scale
        indirect_at = now + config.probe_timeout * scale
        deadline = now + config.probe_interval * scale
        return self._add(Probe(target, now, indirect_at, deadline, timed=timed))

    def begin_urgent(self, now: float, target: str) -> int | None:
        """A probe of somebody whose connection is gone: others are to be asked at once.

        None when one is under way already.
        """
        if any(probe.urgent and probe.target == target for probe in self._probes.values()):
            return None
        deadline = now + self._config.lost_timeout * self._awareness.scale
        return self._add(Probe(target, now, now, deadline, urgent=True))

    def relay(self, now: float, target: str, requester: str, seq: int) -> int | None:
        """Remember whom an ack is for; None when there are too many such requests already."""
        if len(self._relays) >= _MAX_RELAYS or self._relayed_for[requester] >= _MAX_RELAYS_PER_PEER:
            return None
        self._seq += 1
        deadline = now + self._config.probe_interval
        self._relays[self._seq] = _Relay(target, requester, seq, deadline)
        self._nacks[self._seq] = now + self._config.nack_timeout
        self._relayed_for[requester] += 1
        return self._seq

    def acknowledge(self, peer: str, seq: int) -> Probe | None:
        """The probe that an ack from `peer` answers; every probe of that target ends with it."""
        probe = self._probes.get(seq)
        if probe is None or (peer != probe.target and peer not in probe.helpers):
            return None
        self.forget(probe.target)
        self._awareness.improve()
        self.width = max(1, self.width - 1)
        return probe

    def deny(self, peer: str, seq: int) -> None:
        """A helper says that it is there, though the target has not answered it."""
        probe = self._probes.get(seq)
        if probe is not None:
            probe.expected.discard(peer)

    def relayed(self, peer: str, seq: int) -> tuple[str, int] | None:
        """For the ack of a relayed ping: who asked for it, and under which number."""
        relay = self._relays.get(seq)
        if relay is None or relay.target != peer:
            return None
        self._end_relay(seq)
        return relay.requester, relay.seq

    def due_nacks(self, now: float) -> list[tuple[str, int]]:
        """Who is to be told that its target has not answered, and under which number."""
        due = [seq for seq, when in self._nacks.items() if when <= now]
        for seq in due:
            del self._nacks[seq]
        return [(self._relays[seq].requester, self._relays[seq].seq) for seq in due]

    def forget(self, target: str) -> None:
        for seq in [s for s, probe in self._probes.items() if probe.target == target]:
            del self._probes[seq]

    def due_indirect(self, now: float) -> list[tuple[int, Probe]]:
        """Probes for which others are to be asked now; each is returned once."""
        due = [(seq, probe) for seq, probe in self._probes.items() if probe.indirect_at <= now]
        for _, probe in due:
            probe.indirect_at = math.inf
        return due

    def ask(self, probe: Probe, helpers: Iterable[str], reachable: Collection[str]) -> None:
        """`helpers` are asked to probe too; only the reachable ones can be expected to answer."""
        probe.helpers = frozenset(helpers)
        probe.expected = {helper for helper in probe.helpers if helper in reachable}

    def take_failed(self, now: float) -> list[str]:
        """Targets whose probe ended without an ack. Forgets relays that came to nothing."""
        for seq in [s for s, relay in self._relays.items() if relay.deadline <= now]:
            self._end_relay(seq)
        failed = [probe for probe in self._probes.values() if probe.deadline <= now]
        for probe in failed:
            self._awareness.worsen(probe.blame)
            self._widen(probe)
            self.forget(probe.target)
        return list(dict.fromkeys(probe.target for probe in failed))

    def _widen(self, probe: Probe) -> None:
        if probe.blame:
            # Rather this node's own network is at fault.
            self.width = 1
        elif not probe.urgent:
            self.width = min(2 * self.width, _MOST_AT_ONCE)

    def postpone(self, seconds: float) -> None:
        """Push every deadline back, after a time in which this node could not hear answers."""
        for probe in self._probes.values():
            probe.indirect_at += seconds
            probe.deadline += seconds

    @property
    def next_wakeup(self) -> float:
        soonest = next(iter(self._nacks.values()), math.inf)
        for probe in self._probes.values():
            soonest = min(soonest, probe.indirect_at, probe.deadline)
        return soonest

    def _add(self, probe: Probe) -> int:
        self._seq += 1
        self._probes[self._seq] = probe
        return self._seq

    def _end_relay(self, seq: int) -> None:
        relay = self._relays.pop(seq)
        self._nacks.pop(seq, None)
        self._relayed_for[relay.requester] -= 1
        if not self._relayed_for[relay.requester]:
            del self._relayed_for[relay.requester]
