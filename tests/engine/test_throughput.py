"""What the planner promises of a pipeline, against the scheduler on it, in virtual time."""

import heapq
from collections.abc import Sequence

import pytest

from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.scheduler import PlannedStep, Scheduler
from pxd.planning.auto.estimate import score, stage_seconds
from pxd.planning.auto.problem import Problem
from pxd.planning.links import Link
from pxd.planning.model import ModelCost, NodeOffer
from pxd.planning.result import PlanInputs, Workload
from pxd.wire import SampledToken
from tests.planning.clusters import SETTINGS

from .pipeline import Pipeline, request

GIB = 1 << 30
LAYERS = 24
PROMPT, OUTPUT = 64, 200


def problem(stages: int, rtt: float, speeds: Sequence[float]) -> Problem:
    nodes = [f"n{place}" for place in range(stages)]
    offers = [
        NodeOffer(id=node, memory=4 * GIB, tflops=speed, bandwidth=20 * speed)
        for node, speed in zip(nodes, speeds, strict=True)
    ]
    links = [Link(a, b, rtt=rtt) for a in nodes for b in nodes if a != b]
    model = ModelCost(
        layer_bytes=(20_000_000,) * LAYERS,
        embedding_bytes=100_000_000,
        head_bytes=100_000_000,
        tied=False,
        kv_bytes_per_token=(1024,) * LAYERS,
        hidden_size=1024,
        splits=tuple(range(1, LAYERS)),
    )
    workload = Workload(prompt=PROMPT, output=OUTPUT, max_requests=48)
    inputs = PlanInputs(
        model=model,
        offers=tuple(offers),
        settings=SETTINGS,
        links=tuple(links),
        workload=workload,
    )
    return Problem(inputs)


def tokens_per_s(problem: Problem, order: Sequence[int], ends: Sequence[int], count: int) -> float:
    """Of `count` requests, from when all decode until the first of them ends."""
    hops = problem.hops(order)
    scheduler = Scheduler(
        Continuous(
            ContinuousConfig(kv_tokens=100_000, max_in_flight=len(order), prefix_cache=False)
        )
    )
    model = Pipeline()
    for number in range(count):
        scheduler.add(request(number, range(PROMPT), OUTPUT))
    free = [0.0] * len(order)
    arrivals: list[tuple[float, int, list[SampledToken]]] = []
    told: list[float] = []
    now, decoding = 0.0, set[int]()
    while True:
        while (step := scheduler.next_step()) is not None:
            heapq.heappush(
                arrivals,
                (
                    _arrival(problem, order, ends, hops, free, now, step),
                    step.number,
                    model.run(step),
                ),
            )
        now, number, tokens = heapq.heappop(arrivals)
        results = scheduler.step_done(number, tokens)
        decoding.update(result.request for result in results)
        if len(decoding) == count:
            told += [now] * len(results)
        if any(result.finish for result in results):
            return len(told) / (told[-1] - told[0])


def _arrival(
    problem: Problem,
    order: Sequence[int],
    ends: Sequence[int],
    hops: Sequence[float],
    free: list[float],
    now: float,
    step: PlannedStep,
) -> float:
    """When the tokens of a step that is sent now are back at the head."""
    rows = max(1, len(step.rows))
    for stage, seconds in enumerate(stage_seconds(problem, order, ends, rows)):
        now = free[stage] = max(now, free[stage]) + float(seconds)
        now += hops[stage]
    return now


@pytest.mark.parametrize("rtt", [0.0002, 0.02, 0.16])
@pytest.mark.parametrize("speeds", [(1.0,), (1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 1.0, 3.0, 1.0)])
def test_the_planners_throughput_is_reached(speeds: tuple[float, ...], rtt: float) -> None:
    given = problem(len(speeds), rtt, speeds)
    order = range(len(speeds))
    ends = [LAYERS * (place + 1) // len(speeds) for place in order]
    ends = [given.cut_at[end] for end in ends]
    promised = score(given, order, ends)
    reached = tokens_per_s(given, order, ends, promised.requests)
    assert reached == pytest.approx(promised.tokens_per_s, rel=0.05)
    assert tokens_per_s(given, order, ends, 1) < 1.01 / promised.token_s
