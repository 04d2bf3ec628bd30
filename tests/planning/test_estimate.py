"""What a pipeline is expected to do, reckoned by hand.

Every layer has 10^9 bytes of weights, so 10^9 FLOPs per token; every node 1 TFLOP/s and 1,000 GB/s.
A layer of a decode step is then 1 ms of traffic, and 1 ms of arithmetic per request.
"""

from typing import Any

import pytest

from pxd.planning.auto.problem import STAGE_OVERHEAD_S
from pxd.planning.links import HOP_S, Link
from pxd.planning.model import Measured, ModelCost, NodeOffer
from pxd.planning.planner import plan_cluster
from pxd.planning.replan import replan
from pxd.planning.result import PipelineEstimate, PlanInputs, Workload
from tests.planning.clusters import SETTINGS

MS = 1e-3
OVER = STAGE_OVERHEAD_S


def node(name: str, **figures: Any) -> NodeOffer:
    plain: dict[str, Any] = {"memory": 10**11, "tflops": 1.0, "bandwidth": 1000.0}
    return NodeOffer(id=name, **plain | figures)


def model(layers: int = 2, **figures: Any) -> ModelCost:
    plain: dict[str, Any] = {
        "layer_bytes": (10**9,) * layers,
        "embedding_bytes": 0,
        "head_bytes": 0,
        "tied": False,
        "kv_bytes_per_token": (0,) * layers,
        "splits": tuple(range(1, layers)),
        "hidden_size": 500_000,
    }
    return ModelCost(**plain | figures)


def estimated(
    model: ModelCost,
    *stages: tuple[NodeOffer, int, int],
    rtt: float = 0.0,
    **workload: Any,
) -> PipelineEstimate:
    """Of one given pipeline; links carry 1 GB/s, that is a position in 1 ms."""
    offers = tuple(offer for offer, _, _ in stages)
    links = [Link(a.id, b.id, rtt, 1.0) for a in offers for b in offers if a is not b]
    inputs = PlanInputs(
        model=model,
        offers=offers,
        settings=SETTINGS,
        links=tuple(links) if rtt else (),
        workload=Workload(**{"prompt": 1000, "output": 100, "max_requests": 4} | workload),
    )
    chain = tuple((offer.id, start, end) for offer, start, end in stages)
    (estimate,) = replan([chain], inputs, grow=False).move.plan.estimates
    return estimate


def test_one_node_bound_by_its_memory_has_no_hops() -> None:
    found = estimated(model(), (node("a", tflops=1000.0), 0, 2))
    assert found.token_s == pytest.approx(2 * MS + OVER)
    assert [stage.hop_s for stage in found.stages] == [0]
    # Four requests read the weights once.
    assert found.requests == 4
    assert found.tokens_per_s == pytest.approx(4 / found.token_s)
    assert found.stages[0].decode_s == found.token_s


def test_arithmetic_grows_with_the_batch() -> None:
    found = estimated(model(), (node("a"), 0, 2))
    assert found.token_s == pytest.approx(2 * MS + OVER)
    assert found.tokens_per_s == pytest.approx(4 / (8 * MS + OVER))


def test_the_prompt_is_bound_by_arithmetic() -> None:
    found = estimated(model(), (node("a"), 0, 2))
    assert found.stages[0].prefill_s == pytest.approx(2 * 1000 * MS + OVER)
    assert found.ttft_s == pytest.approx(found.stages[0].prefill_s + found.token_s)


def test_faster_number_formats_speed_arithmetic_alone() -> None:
    found = estimated(model(compute_scale=2.0), (node("a"), 0, 2))
    assert found.stages[0].prefill_s == pytest.approx(1000 * MS + OVER)
    assert found.token_s == pytest.approx(2 * MS + OVER)


def test_the_head_is_read_at_every_token_and_never_for_the_prompt() -> None:
    found = estimated(model(head_bytes=3 * 10**9), (node("a"), 0, 1), (node("b"), 1, 2))
    plain = estimated(model(), (node("a"), 0, 1), (node("b"), 1, 2))
    assert [stage.decode_s for stage in found.stages] == pytest.approx(
        [1 * MS + OVER, 4 * MS + OVER]
    )
    assert [a.prefill_s for a in found.stages] == [b.prefill_s for b in plain.stages]


def test_a_long_way_bounds_the_peak() -> None:
    found = estimated(model(), (node("a"), 0, 1), (node("b"), 1, 2), rtt=0.2)
    onward, home = HOP_S + 100 * MS + 1 * MS, HOP_S + 100 * MS
    assert [stage.hop_s for stage in found.stages] == pytest.approx([onward, home])
    assert found.token_s == pytest.approx(2 * (1 * MS + OVER) + onward + home)
    # Two micro-batches of two requests are under way together.
    assert found.requests == 4
    assert found.tokens_per_s == pytest.approx(4 / (2 * (2 * MS + OVER) + onward + home))


def test_the_prompt_is_carried_over_every_hop_but_the_last() -> None:
    found = estimated(model(), (node("a"), 0, 1), (node("b"), 1, 2), rtt=0.2)
    carried = HOP_S + 100 * MS + 1000 * MS
    prefill = sum(stage.prefill_s for stage in found.stages)
    assert found.ttft_s == pytest.approx(prefill + carried + found.token_s)


def test_the_slowest_stage_bounds_the_peak() -> None:
    for stages, bottleneck in (([1, 3], 1), ([3, 1], 0)):
        a = (node("a", tflops=1000.0), 0, stages[0])
        b = (node("b", tflops=1000.0), stages[0], 4)
        found = estimated(model(4, hidden_size=0), a, b)
        assert found.bottleneck == bottleneck
        assert found.stages[bottleneck].decode_s == pytest.approx(3 * MS + OVER)
        # Two requests in each of two micro-batches.
        assert found.tokens_per_s == pytest.approx(4 / (2 * (3 * MS + OVER)))


def test_room_for_requests_bounds_the_batch() -> None:
    # 10^11 bytes of memory are 2 * 10^10 of KV, and a request of 1,100 tokens takes 8.8 * 10^9.
    small = model(kv_bytes_per_token=(4_000_000,) * 2)
    found = estimated(small, (node("a", tflops=1000.0), 0, 2))
    assert found.requests == 2
    # Half-way through a request 1,050 tokens of KV are read beside the weights.
    assert found.token_s == pytest.approx(2 * (1 * MS + 1050 * 0.004 * MS) + OVER)


def test_chunks_of_a_long_prompt_follow_each_other() -> None:
    long = estimated(model(), (node("a"), 0, 1), (node("b"), 1, 2), rtt=0.2, prompt=3 * 2048)
    chunk = 2048 * MS + OVER
    carried = HOP_S + 100 * MS + 2048 * MS
    assert [stage.prefill_s for stage in long.stages] == pytest.approx([3 * chunk] * 2)
    # The first chunk goes all the way; each of the others ends one chunk's time after the last.
    assert long.ttft_s == pytest.approx(2 * chunk + carried + 2 * chunk + long.token_s)


def test_one_more_token_in_the_prompt_is_little_more_work() -> None:
    full = estimated(model(), (node("a"), 0, 2), prompt=2048)
    more = estimated(model(), (node("a"), 0, 2), prompt=2049)
    assert full.ttft_s < more.ttft_s < 1.01 * full.ttft_s


def test_measured_figures_are_what_is_expected() -> None:
    a = node("a", measured=Measured(0, 1, 7 * MS, 0.5 * MS))
    b = node("b", measured=Measured(1, 3, 11 * MS, 0.25 * MS))
    found = estimated(model(3, head_bytes=10**9), (a, 0, 1), (b, 1, 3))
    assert [stage.decode_s for stage in found.stages] == pytest.approx([7 * MS, 11 * MS])
    assert [stage.prefill_s for stage in found.stages] == pytest.approx([500 * MS, 250 * MS])
    assert found.token_s == pytest.approx(18 * MS + sum(stage.hop_s for stage in found.stages))


def test_measured_figures_carry_over_to_other_layers_in_proportion() -> None:
    # Three layers took twice their roofline, so the fourth is taken to do so too.
    slow = node("a", measured=Measured(0, 3, 2 * (3 * MS + OVER)))
    found = estimated(model(4), (slow, 0, 4))
    assert found.token_s == pytest.approx(2 * (4 * MS + OVER))


def test_unknown_speeds_are_the_mean_of_known_ones() -> None:
    known = node("a", bandwidth=500.0), node("b", bandwidth=1500.0)
    inputs = PlanInputs(
        model=model(1), offers=(*known, node("c", bandwidth=0.0)), settings=SETTINGS
    )
    plan = plan_cluster(inputs)
    times = {
        pipeline.stages[0].node: estimate.token_s
        for pipeline, estimate in zip(plan.pipelines, plan.estimates, strict=True)
    }
    # A mean of 1,000 GB/s.
    assert times["c"] == pytest.approx(1 * MS + OVER)
