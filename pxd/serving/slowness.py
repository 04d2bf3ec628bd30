"""Notices a stage that falls far behind its own figures, and remembers a node that did. No clock.

A step is compared with those of about the same size and with about as much context before it.
Times are in seconds.
"""

import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from pxd.serving.timings import Figure, moved
from pxd.wire import Row

SLOW, WELL = 3.0, 1.5
"""How many times longer than usual steps take of who becomes slow, and of who is so no more."""
AFTER_S = 20.0
WINDOW_S, WINDOW_STEPS = 5.0, 4
GAP_S = 60.0
FACTOR_SHARE = 0.3
WINDOWS = 3
MAX_SHAPES = 256

HOLDS_S = (600.0, 1800.0, 7200.0)
SOUND_AFTER_S = 7200.0


Weights = tuple[str, str, int, int]
"""Of a stage: name and fingerprint of the model, first layer and the one behind the last."""


class _Shape(NamedTuple):
    """Powers of two: positions of a step, and positions that they attend to."""

    positions: int
    context: int


def _shape(rows: Sequence[Row]) -> _Shape:
    positions = sum(row.count for row in rows)
    context = sum(row.count * row.position for row in rows)
    return _Shape(positions.bit_length(), context.bit_length())


class Slowness:
    """One stage. `factor` is how many times longer than usual its steps take, 0 while that is not
    far. It changes when every one of several windows in a row says so, for `AFTER_S` at least: a
    single pause, however long, is within one of them.
    """

    def __init__(self) -> None:
        self.factor = 0.0
        self._usual: dict[_Shape, Figure] = {}
        # Windows in a row that speak against the present state, and when the first began.
        self._contrary, self._contrary_since = 0, 0.0
        self._begin(-math.inf)

    def _begin(self, now: float) -> None:
        self._began, self._last = now, now
        self._took = self._expected = 0.0
        self._steps = 0

    def add(self, rows: Sequence[Row], seconds: float, now: float) -> bool:
        """A step took that long. Says whether that is as usual, as far as is known."""
        shape = _shape(rows)
        figure = self._usual.get(shape)
        usual = figure.value if figure is not None else 0.0
        ordinary = seconds < SLOW * usual if usual else not self._is_doubtful
        if ordinary and not self.factor and rows:
            self._learn(shape, seconds)
        if usual:
            self._compare(seconds, usual, now)
        return ordinary

    @property
    def _is_doubtful(self) -> bool:
        """Whatever is measured now may be far from what is usual."""
        return self.factor > 0 or self._contrary > 0

    def _learn(self, shape: _Shape, seconds: float) -> None:
        figure = self._usual.get(shape)
        if figure is None:
            if len(self._usual) >= MAX_SHAPES:
                del self._usual[next(iter(self._usual))]
            figure = self._usual[shape] = Figure(warm_up=1, needed=8, window=64)
        figure.add(seconds)

    def _compare(self, seconds: float, usual: float, now: float) -> None:
        if now - self._last > GAP_S + seconds:
            self._contrary = 0
            self._begin(now - seconds)
        self._last = now
        self._took += seconds
        self._expected += usual
        self._steps += 1
        if self._steps < WINDOW_STEPS or now - self._began < WINDOW_S:
            return
        self._judge(self._took / self._expected, now)
        self._begin(now)

    def _judge(self, ratio: float, now: float) -> None:
        """A window is over in which steps took `ratio` times what they usually take."""
        if self.factor and ratio > WELL and moved(self.factor, max(ratio, SLOW), FACTOR_SHARE):
            self.factor = max(ratio, SLOW)
        contrary = ratio <= WELL if self.factor else ratio >= SLOW
        if not contrary:
            self._contrary = 0
            return
        if not self._contrary:
            self._contrary_since = self._began
        self._contrary += 1
        if self._contrary >= WINDOWS and now - self._contrary_since >= AFTER_S:
            self.factor = 0.0 if self.factor else ratio
            self._contrary = 0


class SlowNode:
    """Remembers that a node was slow when the stage that showed it is gone from it.

    Otherwise the next plan would give it back what the last one took from it. It is remembered for
    longer each time.
    """

    def __init__(self) -> None:
        self.factor = 0.0
        self._slow: frozenset[Weights] = frozenset()
        self._until = -math.inf
        self._holds = 0

    def update(self, factors: Mapping[Weights, float], now: float) -> float:
        """`factors` are those of the stages that are here. Returns the node's, 0 for none."""
        slow = {key: factor for key, factor in factors.items() if factor}
        if slow:
            self.factor = max(slow.values())
        elif self._slow & factors.keys():
            self.factor = 0.0
        elif self._slow:
            self._hold(now)
        elif now >= self._until:
            self.factor = 0.0
        self._slow = frozenset(slow)
        return self.factor

    def _hold(self, now: float) -> None:
        if now - self._until > SOUND_AFTER_S:
            self._holds = 0
        self._until = now + HOLDS_S[min(self._holds, len(HOLDS_S) - 1)]
        self._holds += 1

    def forget(self) -> None:
        self.factor, self._slow, self._until, self._holds = 0.0, frozenset(), -math.inf, 0
