"""What MLX can compute side by side.

MLX runs each stream of a CPU in one thread, and of most of its operations on a CPU the cost grows
with the rows. So a CPU gets a stream for each core, and requests are spread over them as far as
that pays: every further pass has to be built and handed out, by one thread for all of them. A GPU
is better filled by one large batch in its one stream.
"""

import math
import os
import time
from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx

from pxd.executors.mlx.batch import Batch, Request
from pxd.executors.mlx.stage import Caches, Stage
from pxd.executors.mlx.trial import dummy_inputs, merged

MOST = 16
"""Every group reads all weights, which the memory can do for so many cores and not for more."""

TRIAL_ROWS = 3
TRIAL_S = 0.5
WIDTH = "256"
"""MLX hands out operations breadth first as long as no more than so many are ready, 20 by default;
beyond that it goes depth first, which is one lane after the other."""


def make_lanes() -> tuple[mx.Stream, ...]:
    """The default device's streams, at least one."""
    device = mx.default_device()
    first = mx.default_stream(device)
    if device.type != mx.DeviceType.cpu:
        return (first,)
    # MLX reads it when it first computes.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", WIDTH)
    return first, *(mx.new_stream(device) for _ in range(min(_cores(), MOST) - 1))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@dataclass(frozen=True)
class Pace:
    """Seconds: `begin` to build and hand out a pass, and `row` for each further row of one."""

    begin: float
    row: float

    def lanes_for(self, rows: int, most: int) -> int:
        """Over how many of `most` lanes to spread so many rows.

        The time of n passes is about n * `begin` + rows * `row` / n.
        """
        best = math.isqrt(int(rows * self.row / self.begin)) if self.begin > 0 else most
        return max(1, min(best, rows, most))


def measure_pace(stage: Stage, dtype: mx.Dtype) -> Pace:
    """Of decode steps; takes about `TRIAL_S`, or two steps where that is longer."""
    alone = [stage.make_caches() for _ in range(TRIAL_ROWS)]
    for caches in alone:
        stage.forward(dummy_inputs(stage, 1, 2, dtype), caches)
    together, single = merged(alone), alone[0]
    begin, one, several = math.inf, math.inf, math.inf
    until = time.perf_counter() + TRIAL_S
    while True:
        thread, one_s = _time(stage, dummy_inputs(stage, 1, 1, dtype), single)
        _, several_s = _time(stage, dummy_inputs(stage, TRIAL_ROWS, 1, dtype), together)
        begin, one, several = min(begin, thread), min(one, one_s), min(several, several_s)
        if time.perf_counter() >= until:
            return Pace(begin, max(0.0, several - one) / (TRIAL_ROWS - 1))


def _time(stage: Stage, inputs: mx.array, caches: Caches) -> tuple[float, float]:
    """Seconds that this thread was busy with one pass, and that it took in all."""
    mx.eval(inputs, [cache.state for cache in caches])
    busy, began = time.thread_time(), time.perf_counter()
    output = stage.forward(inputs, caches)
    mx.eval(output, [cache.state for cache in caches])
    return time.thread_time() - busy, time.perf_counter() - began


def spread(requests: Sequence[Request], lanes: int) -> list[list[Request]]:
    """At most `lanes` groups whose sizes differ by one at most, of those who shared a batch before
    as far as that goes: to leave one and join another copies a request's caches."""
    if not requests:
        return []
    count = min(lanes, len(requests))
    least, larger = divmod(len(requests), count)
    sizes = [least + (place < larger) for place in range(count)]
    shared: dict[int, list[Request]] = {}
    loose: list[Request] = []
    for request in requests:
        batch: Batch | None = request.batch
        if batch is None:
            loose.append(request)
        else:
            shared.setdefault(id(batch), []).append(request)
    groups: list[list[Request]] = []
    for members in sorted(shared.values(), key=len, reverse=True):
        kept = sizes[len(groups)] if len(groups) < count else 0
        if kept:
            groups.append(members[:kept])
        loose += members[kept:]
    groups += [[] for _ in range(count - len(groups))]
    for group, size in zip(groups, sizes, strict=True):
        missing = size - len(group)
        group += loose[:missing]
        del loose[:missing]
    return groups
