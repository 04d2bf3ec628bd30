"""When this node speaks of itself: often enough to be known, and no oftener than others listen."""

import math
from collections.abc import Iterable

import msgspec

from pxd.cluster.allowance import Allowance
from pxd.cluster.config import MembershipConfig
from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.records import NodeRecord

_LOAD = frozenset({"running", "waiting", "links"})
"""What changes all the time; it must not keep more important changes waiting."""
_NONE = -1


class Voice:
    """Paces the news of own changes, and contradictions of what others say of this node."""

    def __init__(self, config: MembershipConfig) -> None:
        self._config = config
        self._untold: frozenset[str] = frozenset()
        self._spreading = Allowance(config.record_rate, config.record_burst)
        self._slander = _NONE
        self._refutations = Allowance(config.refutation_rate, config.refutation_burst)

    def changed(self, fields: Iterable[str]) -> None:
        """These fields of the own record are others than the members know."""
        self._untold |= frozenset(fields)

    def is_due(self, now: float, members: int) -> bool:
        """Whether to tell of the changes now: the more members, the less often each one does."""
        crowd = max(1.0, members / self._config.flat_members)
        self._spreading.rate = self._config.record_rate / crowd
        if not self._untold or not self._spreading.take(now, reserve=self._reserve):
            return False
        self._untold = frozenset()
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

    def next_wakeup(self, own: NodeRecord) -> float:
        return min(
            self._spreading.ready_at(1 + self._reserve) if self._untold else math.inf,
            self._refutations.ready_at() if self._slander >= own.incarnation else math.inf,
        )

    @property
    def _reserve(self) -> float:
        """How much has to be left for changes that matter more than those waiting."""
        burst = self._config.record_burst
        return max(0.0, min(burst / 2, burst - 1)) if self._untold <= _LOAD else 0.0
