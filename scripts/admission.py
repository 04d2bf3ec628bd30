"""Compares the two ways of letting requests in, on the real scheduler and a modelled pipeline.

    scripts/admission [--requests N]

Prints one line per workload and way: tokens per second, the time to the first token (median and
95th percentile), how often somebody had to make room, and the positions computed again for that.
A step takes 20 ms, 0.5 ms for each decode and 1.5 ms for each position of a prompt: about what an
8B model takes on a laptop. At `load` 1 requests come as fast as 16 at once would be served; prompts
and answers have log-normal lengths.
"""

import argparse
import heapq
import math
import random
import statistics
from dataclasses import dataclass

from pxd.engine.continuous import Admission, Continuous, ContinuousConfig
from pxd.engine.requests import NewRequest
from pxd.engine.scheduler import PlannedStep, Scheduler
from pxd.wire import SampledToken, Sampling

STEP_S, DECODE_S, PREFILL_S = 20e-3, 0.5e-3, 1.5e-3
EOS = 0


@dataclass
class Workload:
    """Mean lengths in tokens; `allowed` is the max_tokens that clients ask for."""

    name: str
    kv_tokens: int
    prompt: int
    answer: int
    allowed: int
    load: float


WORKLOADS = [
    Workload("chat, max_tokens left open", 32_768, 400, 250, 4096, 0.9),
    Workload("chat, max_tokens left open, overload", 32_768, 400, 250, 4096, 2.0),
    Workload("chat, max_tokens 1024", 32_768, 400, 250, 1024, 0.9),
    Workload("chat, large cache", 262_144, 400, 250, 4096, 0.9),
    Workload("chat, tiny cache", 8_192, 400, 250, 4096, 0.9),
    Workload("documents", 65_536, 4000, 200, 4096, 0.9),
    Workload("answers as long as allowed", 32_768, 400, 1024, 1024, 2.0),
    Workload("answers as long as allowed, tiny cache", 8_192, 400, 1024, 1024, 2.0),
]


@dataclass
class Result:
    seconds: float
    tokens: int
    first: list[float]
    preempted: int
    again: int


def arrivals(work: Workload, count: int, rng: random.Random) -> list[tuple[float, NewRequest, int]]:
    """(time, request, length of its answer). `load` 1 is what 16 at once would keep up with."""
    each = work.prompt * PREFILL_S + work.answer * (STEP_S / 16 + DECODE_S)
    now, found = 0.0, []
    for number in range(count):
        now += rng.expovariate(work.load / each)
        prompt = length(rng, work.prompt)
        answer = work.allowed if work.answer == work.allowed else length(rng, work.answer)
        request = NewRequest(
            number=number,
            tokens=[number + 1] * prompt,
            max_new=work.allowed,
            sampling=Sampling(),
            eos=frozenset({EOS}),
        )
        found.append((now, request, min(answer, work.allowed)))
    return found


def length(rng: random.Random, mean: float) -> int:
    sigma = 0.8
    return max(2, int(rng.lognormvariate(math.log(mean) - sigma**2 / 2, sigma)))


def run(work: Workload, admission: Admission, count: int) -> Result:
    todo = arrivals(work, count, random.Random(work.name))
    came = {request.number: when for when, request, _ in todo}
    ends = {request.number: len(request.tokens) + n for _, request, n in todo}
    config = ContinuousConfig(kv_tokens=work.kv_tokens, admission=admission, prefill_chunk=512)
    scheduler = Scheduler(Continuous(config))
    scheduler.policy.mixed_tokens = 256  # type: ignore[attr-defined]
    heapq.heapify(todo)
    now, tokens, first = 0.0, 0, {}
    opened: dict[int, int] = {}
    again = 0
    while todo or scheduler.requests:
        while todo and todo[0][0] <= now:
            scheduler.add(heapq.heappop(todo)[1])
        step = scheduler.next_step()
        if step is None:
            now = todo[0][0]
            continue
        for opening in step.openings:
            opened[opening.request] = opened.get(opening.request, 0) + 1
        again += sum(row.count for row in step.rows if opened[row.request] > 1 and not row.draws)
        now += cost(step)
        sampled = [
            SampledToken(row.request, end, EOS if end >= ends[row.request] else row.request + 1)
            for row in step.rows
            if row.draws and (end := row.position + row.count)
        ]
        for result in scheduler.step_done(step.number, sampled):
            tokens += len(result.tokens)
            first.setdefault(result.request, now - came[result.request])
    return Result(now, tokens, sorted(first.values()), sum(opened.values()) - count, again)


def cost(step: PlannedStep) -> float:
    decodes = sum(row.draws for row in step.rows)
    return STEP_S * bool(step.rows) + decodes * DECODE_S + (len(step.tokens) - decodes) * PREFILL_S


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, add_help=True)
    parser.add_argument("--requests", type=int, default=400)
    count = parser.parse_args().requests
    print(f"{'workload':40} {'way':8} {'tok/s':>7} {'TTFT':>8} {'p95':>8} {'out':>5} {'again':>7}")
    for work in WORKLOADS:
        for admission in ("reserve", "preempt"):
            result = run(work, admission, count)
            print(
                f"{work.name:40} {admission:8} {result.tokens / result.seconds:7.1f} "
                f"{statistics.median(result.first):7.2f}s "
                f"{result.first[int(len(result.first) * 0.95)]:7.2f}s "
                f"{result.preempted:5} {result.again:7}"
            )


if __name__ == "__main__":
    main()
