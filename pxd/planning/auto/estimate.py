"""What a chain of stages does: time to first token, time per token, peak tokens/s, bottleneck.

With M micro-batches in flight, one round of a pipeline takes as long as the slowest stage needs for
all of them, or as one of them needs for the whole way round, whichever is longer.
"""

from collections.abc import Sequence
from functools import cache

import msgspec
import numpy as np
import numpy.typing as npt

from pxd.planning.auto.problem import Problem, Tables
from pxd.planning.auto.work import Floats
from pxd.planning.result import PipelineEstimate, StageEstimate


class Score(msgspec.Struct, frozen=True):
    """What counts of a chain: `value` is its share of a plan's objective, in tokens/s.

    `tokens_per_s` is reached with `requests` at once, of which every step holds `batch`.
    """

    value: float
    tokens_per_s: float
    token_s: float
    requests: int
    batch: int


Places = tuple[npt.NDArray[np.intp], npt.NDArray[np.intp], npt.NDArray[np.intp]]
"""Of each stage of a chain: the node's row in tables, and the cuts where it begins and ends."""


@cache
def loads(stages: int, most: int) -> tuple[tuple[int, int, int], ...]:
    """(requests, micro-batches, requests in each) that a pipeline is tried with, most first.

    Batches are powers of two; `most` bounds the requests.
    """
    found, batch = [], 1
    while batch * stages <= most:
        found.append((batch * stages, stages, batch))
        batch *= 2
    fewer = min(stages - 1, most)
    while fewer >= 1:
        found.append((fewer, fewer, 1))
        fewer //= 2
    return tuple(sorted(found, reverse=True))


def penalised(problem: Problem, tokens_per_s: float, token_s: float) -> float:
    """Tokens/s, counted for less by the square of how far the latency bound is broken."""
    return tokens_per_s * min(1.0, problem.workload.token_limit_s / token_s) ** 2


def score(problem: Problem, order: Sequence[int], ends: Sequence[int]) -> Score:
    """Of the stages that end at the cuts `ends`, on the nodes `order`."""
    hops, places = sum(problem.hops(order)), _places(problem, order, ends)
    token_s = float(_seconds(problem.decode(1), places).sum()) + hops
    most = max_requests(problem, order, ends)
    best = Score(0.0, 0.0, token_s, 0, 1)
    for requests, waves, batch in loads(len(order), most):
        seconds = _seconds(problem.decode(batch), places)
        speed = requests / max(waves * float(seconds.max()), float(seconds.sum()) + hops)
        if speed > best.tokens_per_s:
            value = penalised(problem, speed, token_s)
            best = Score(value, speed, token_s, requests, batch)
    return best


def max_requests(problem: Problem, order: Sequence[int], ends: Sequence[int]) -> int:
    """How many requests of the workload's length have room at once; never less than one."""
    most = problem.workload.max_requests
    for node, start, end in _spans(order, ends):
        need = problem.request_bytes[end] - problem.request_bytes[start]
        if need > 0:
            most = min(most, int(problem.kv_rooms[problem.kinds[node]] // need))
    return max(1, most)


def stage_seconds(
    problem: Problem, order: Sequence[int], ends: Sequence[int], batch: int
) -> Floats:
    """Seconds of a decode step of `batch` requests on each stage."""
    return _seconds(problem.decode(batch), _places(problem, order, ends))


def estimate(problem: Problem, order: Sequence[int], ends: Sequence[int]) -> PipelineEstimate:
    scored = score(problem, order, ends)
    decode = stage_seconds(problem, order, ends, 1)
    chunk = _seconds(problem.prefill, _places(problem, order, ends))
    hops = problem.hops(order)
    carried = problem.hops(order, problem.chunk)
    # Chunks follow each other through the pipeline; the last prompt token is a decode step.
    prompt = chunk.sum() + sum(carried[:-1]) + (problem.chunks - 1) * chunk.max()
    return PipelineEstimate(
        ttft_s=float(prompt) + scored.token_s,
        token_s=scored.token_s,
        tokens_per_s=scored.tokens_per_s,
        requests=scored.requests,
        bottleneck=int(np.argmax(stage_seconds(problem, order, ends, scored.batch))),
        stages=tuple(
            StageEstimate(float(one), float(several) * problem.chunks, hop)
            for one, several, hop in zip(decode, chunk, hops, strict=True)
        ),
    )


def _places(problem: Problem, order: Sequence[int], ends: Sequence[int]) -> Places:
    rows = np.array([problem.kinds[node] for node in order])
    return rows, np.array([0, *ends[:-1]]), np.array(ends)


def _seconds(tables: Tables, places: Places) -> Floats:
    (sums, beside), (rows, starts, stops) = tables, places
    seconds: Floats = sums[rows, stops] - sums[rows, starts] + beside[rows]
    return seconds


def _spans(order: Sequence[int], ends: Sequence[int]) -> list[tuple[int, int, int]]:
    starts = [0, *ends[:-1]]
    return list(zip(order, starts, ends, strict=True))
