"""When this node speaks of itself: often enough to be known, and no oftener than others listen."""

import math

import msgspec

from pxd.cluster.allowance import Allowance
from pxd.cluster.config import MembershipConfig
from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.records import NodeRecord

_LOAD = frozenset({"running", "waiting", "links"})
"""What changes all the time; it must not keep more important changes waiting."""
_ECHO = frozenset({"term", "plan"})
"""What most nodes only repeat after their leader."""
_NONE = -1


class Voice:
    """Paces the news of own changes, and contradictions of what others say of this node."""

    def __init__(self, config: MembershipConfig) -> None:
        self._config = config
        self._untold: frozenset[str] = frozenset()
        self._has_echo = False
        self._spreading = Allowance(config.record_rate, config.record_burst)
        self._slander = _NONE
        self._refutations = Allowance(config.refutation_rate, config.refutation_burst)

    def changed(self, fields: frozenset[str], own: NodeRecord) -> None:
        """These fields of the own record, now `own`, are others than the members know.

        From `flat_members` on nobody is told of an echo for its own sake, lest every word of the
        leader makes as many rumours as there are members: full synchronisation brings it.
        """
        if fields <= _ECHO and (own.plan is None or own.plan.leader != own.id):
            self._has_echo = True
        else:
            self._untold |= fields

    def is_due(self, now: float, members: int) -> bool:
        """Whether to tell of the changes now: the more members, the less often each one does."""
        crowd = max(1.0, members / self._config.flat_members)
        self._spreading.rate = self._config.record_rate / crowd
        if not self._is_untold(members) or not self._spreading.take(now, reserve=self._reserve):
            return False
        self._untold = frozenset()
        self._has_echo = False
        return True

    def slandered(self, incarnation: int) -> None:
        """Somebody doubts this node as of a life that it has had."""
        self._slander = max(self._slander, incarnation)

    def refutation(self, now: float, own: NodeRecord) -> NodeRecord | None:
        """The record that outbids what is said of this node, if it is time for one."""
        if self._slander < own.incarnation or not self._refutations.take(now):
            return None
        incarnation = min(self._slander + 1, LAST_COUNT)
        # At the end of all numbers a later version must do.
        later = own.version if incarnation > own.incarnation else own.version + 1
        self._slander = _NONE
        return msgspec.structs.replace(own, incarnation=incarnation, version=min(later, LAST_COUNT))

    def next_wakeup(self, own: NodeRecord, members: int) -> float:
        untold = self._is_untold(members)
        return min(
            self._spreading.ready_at(1 + self._reserve) if untold else math.inf,
            self._refutations.ready_at() if self._slander >= own.incarnation else math.inf,
        )

    @property
    def _reserve(self) -> float:
        """How much has to be left for changes that matter more than those waiting."""
        burst = self._config.record_burst
        mere_load = self._untold <= _LOAD and not self._has_echo
        return max(0.0, min(burst / 2, burst - 1)) if mere_load else 0.0

    def _is_untold(self, members: int) -> bool:
        return bool(self._untold) or (self._has_echo and members <= self._config.flat_members)
