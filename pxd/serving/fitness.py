"""When a node should leave a model to others, because its executor keeps failing. No clock."""

import math
from collections import deque

from pxd.cluster.records import MAX_UNFIT, Unfit

DEATHS, FAILED_LOADS = 5, 3
WITHIN_S = 600.0
PAUSES_S = (60.0, 300.0, 900.0, 3600.0)
SOUND_AFTER_S = 3600.0
"""Who has held out for so long after a pause begins with the shortest one again."""

Layers = tuple[int, int]


class _Case:
    """What has happened to one model's stages here; it is left to others until `until`."""

    def __init__(self) -> None:
        self.deaths: dict[Layers, deque[float]] = {}
        self.failed_loads: deque[float] = deque(maxlen=FAILED_LOADS)
        self.pauses = 0
        self.until = -math.inf
        self.reason = ""


class Fitness:
    """Counts what goes wrong. The same stage's executor died `DEATHS` times within `WITHIN_S`, or
    as many as `FAILED_LOADS` loads failed: then the node is unfit for that model for a while, which
    grows from time to time."""

    def __init__(self) -> None:
        self._cases: dict[str, _Case] = {}

    def died(self, model: str, layers: Layers, now: float, why: str) -> None:
        case = self._cases.setdefault(model, _Case())
        deaths = case.deaths.setdefault(layers, deque(maxlen=DEATHS))
        deaths.append(now)
        if len(deaths) == DEATHS and now - deaths[0] <= WITHIN_S:
            start, end = layers
            self._rest(case, now, f"its executor of layers [{start}, {end}) keeps dying: {why}")

    def load_failed(self, model: str, now: float, why: str) -> None:
        case = self._cases.setdefault(model, _Case())
        case.failed_loads.append(now)
        loads = case.failed_loads
        if len(loads) == FAILED_LOADS and now - loads[0] <= WITHIN_S:
            self._rest(case, now, f"it cannot load its layers: {why}")

    def _rest(self, case: _Case, now: float, why: str) -> None:
        if now < case.until:
            # It goes on as long as nobody stands in for it.
            return
        if now - case.until > SOUND_AFTER_S:
            case.pauses = 0
        pause = PAUSES_S[min(case.pauses, len(PAUSES_S) - 1)]
        case.pauses += 1
        case.until = now + pause
        case.reason = f"{why[:200]}; it tries again in {pause / 60:g} min"
        case.deaths.clear()
        case.failed_loads.clear()

    def forgive(self) -> None:
        """Somebody has seen to it."""
        self._cases.clear()

    def unfit(self, now: float) -> tuple[Unfit, ...]:
        """The models that others have to serve."""
        found = [
            Unfit(model, case.reason) for model, case in self._cases.items() if now < case.until
        ]
        return tuple(sorted(found)[:MAX_UNFIT])
