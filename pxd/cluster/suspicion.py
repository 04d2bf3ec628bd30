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
        self._accusers: set[str] = set()

    def confirm(self, accuser: str, config: MembershipConfig) -> bool:
        """Count an accuser; says whether it is a new one that is still worth passing on."""
        # The first accuser raised the suspicion; only those after it confirm it.
        if accuser in self._accusers or len(self._accusers) > config.confirmations:
            return False
        self._accusers.add(accuser)
        return True

    def deadline(self, members: int, config: MembershipConfig) -> float:
        """When the member is to be declared dead, given the number of live members."""
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
