"""When to plan after a change: once the burst of changes that it belongs to is over.

Nodes come and go in bursts, and a plan that is replaced before anything is loaded is of use to
nobody. But where nothing is served any more, everybody waits for the plan.
"""

QUIET_S = 1.0
"""Without a change, and a burst is over."""
LONGEST_S = 4.0
"""A burst that goes on is not waited for any longer."""
STRANDED_S = 0.3
"""What is waited for others that died of the same, where nothing is served any more."""


class Settling:
    """One burst of changes, which began at `now`. `view` is what plans follow from."""

    def __init__(self, now: float, view: object) -> None:
        self._view = view
        self._quiet_since = now
        self._latest = now + LONGEST_S

    def rest(self, now: float, view: object, *, stranded: bool) -> float:
        """In how many seconds to plan, as far as can be told now; 0 when it is time.

        `stranded` says whether something that was served waits for the plan.
        """
        if view != self._view:
            self._view, self._quiet_since = view, now
        if stranded:
            self._latest = min(self._latest, now + STRANDED_S)
        return max(0.0, min(self._quiet_since + QUIET_S, self._latest) - now)
