"""How long a suspicion lasts: shorter the more members confirm it independently.

After "Lifeguard: SWIM-ing with Situational Awareness" (Dadgar, Phillips, Currey 2018), as in
memberlist: one slow observer alone should not bury a member.
"""

import math

from pxd.cluster.config import MembershipConfig


class Suspicion:
    """A running suspicion against one member as of `incarnation`."""

    def __init__(self, incarnation: int, started: float) -> None:
        self.incarnation = incarnation
        self.started = started
        self.latest = math.inf
        self._accusers: set[str] = set()

    def confirm(self, accuser: str, config: MembershipConfig) -> bool:
        """Count an accuser; says whether it is a new one that is still worth passing on."""
        # The first accuser raised the suspicion; only those after it confirm it.
        if accuser in self._accusers or len(self._accusers) > config.confirmations:
            return False
        self._accusers.add(accuser)
        return True

    def deadline(self, members: int, config: MembershipConfig) -> float:
        """When the member is to be declared dead, given the number of live members; `latest` says
        when at the latest."""
        return min(self.latest, self._regular_deadline(members, config))

    def _regular_deadline(self, members: int, config: MembershipConfig) -> float:
        shortest = (
            config.suspicion_factor * max(1.0, math.log10(max(1, members))) * config.probe_interval
        )
        # Besides the accused and the first accuser there must be enough members to confirm.
        if members - 2 < config.confirmations:
            return self.started + shortest
        confirmed = max(0, len(self._accusers) - 1)
        share = math.log(confirmed + 1) / math.log(config.confirmations + 1)
        longest = shortest * config.suspicion_spread
        return self.started + max(shortest, longest - share * (longest - shortest))


class Suspicions:
    """All that are running, at most one against each member."""

    def __init__(self, config: MembershipConfig) -> None:
        self._config = config
        self._running: dict[str, Suspicion] = {}
        # For how many members, when, and whose it is; kept while it is the earliest for certain.
        self._earliest: tuple[int, float, str] | None = None

    def accuse(self, now: float, node: str, incarnation: int) -> bool:
        """Suspect a member; says whether that is new, or about a later life than before."""
        running = self._running.get(node)
        if running is not None and incarnation <= running.incarnation:
            return False
        self.end(node)
        self._running[node] = Suspicion(incarnation, now)
        self._advance(node)
        return True

    def confirm(self, node: str, accuser: str) -> bool:
        """As `Suspicion.confirm`."""
        news = self._running[node].confirm(accuser, self._config)
        self._advance(node)
        return news

    def hasten(self, node: str, latest: float) -> None:
        """If the member is suspected, declare it dead no later than that."""
        if node in self._running:
            self._running[node].latest = min(self._running[node].latest, latest)
            self._advance(node)

    def end(self, node: str) -> None:
        ended = self._running.pop(node, None) is not None
        if ended and self._earliest is not None and self._earliest[2] == node:
            self._earliest = None

    def postpone(self, seconds: float) -> None:
        for suspicion in self._running.values():
            suspicion.started += seconds
            suspicion.latest += seconds
        self._earliest = None

    def next_deadline(self, members: int) -> float:
        if self._earliest is None or self._earliest[0] != members:
            deadlines = ((s.deadline(members, self._config), n) for n, s in self._running.items())
            self._earliest = members, *min(deadlines, default=(math.inf, ""))
        return self._earliest[1]

    def expired(self, now: float, members: int) -> list[tuple[str, int]]:
        """Nodes whose time to speak up is over, and the lives they were suspected in."""
        if self.next_deadline(members) > now:
            return []
        return [
            (node, suspicion.incarnation)
            for node, suspicion in self._running.items()
            if suspicion.deadline(members, self._config) <= now
        ]

    def _advance(self, node: str) -> None:
        """The deadline of that suspicion is new, or earlier than it was."""
        if self._earliest is not None:
            members, earliest, _ = self._earliest
            deadline = self._running[node].deadline(members, self._config)
            if deadline < earliest:
                self._earliest = members, deadline, node
