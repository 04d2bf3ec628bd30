"""What MLX can compute side by side.

MLX runs each stream of a CPU in one thread, and of most of its operations on a CPU the cost grows
with the rows. So a CPU gets a stream for each core, and requests are spread over them. A GPU is
better filled by one large batch in its one stream.
"""

import os
from collections.abc import Sequence

import mlx.core as mx

from pxd.executors.mlx.batch import Batch, Request

MOST = 16
"""Every group reads all weights, which the memory can do for so many cores and not for more."""


def make_lanes() -> tuple[mx.Stream, ...]:
    """The default device's streams, at least one."""
    device = mx.default_device()
    first = mx.default_stream(device)
    if device.type != mx.DeviceType.cpu:
        return (first,)
    return first, *(mx.new_stream(device) for _ in range(min(_cores(), MOST) - 1))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


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
