"""Figures come from other nodes: whatever passes their bounds, a plan can be made from it."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.links import Link
from pxd.planning.model import Experts, Measured, ModelCost, NodeOffer
from pxd.planning.replan import decide
from pxd.planning.result import Basis, PlanInputs

from .clusters import SETTINGS

LEAST = 5e-324
SIZES = st.one_of(st.sampled_from((0, 1, 1 << 60)), st.integers(0, 1 << 40))
SPEEDS = st.one_of(st.sampled_from((0.0, LEAST, 1e-300, 1e12)), st.floats(0, 1e12))
SECONDS = st.one_of(st.sampled_from((0.0, LEAST, 1e9)), st.floats(0, 1e9))
EXPERTS = st.one_of(st.none(), st.builds(Experts, SIZES, SIZES, SIZES))


@st.composite
def costs(draw: st.DrawFn) -> ModelCost:
    layers = draw(st.integers(1, 6))
    each = st.lists(SIZES, min_size=layers, max_size=layers).map(tuple)
    perhaps = st.one_of(st.just(()), each)
    experts = st.lists(EXPERTS, min_size=layers, max_size=layers).map(tuple)
    return ModelCost(
        layer_bytes=draw(each),
        embedding_bytes=draw(SIZES),
        head_bytes=draw(SIZES),
        tied=draw(st.booleans()),
        kv_bytes_per_token=draw(each),
        splits=draw(st.lists(SIZES | st.integers(0, layers), max_size=8).map(tuple)),
        layer_flops=draw(perhaps),
        attention_flops=draw(perhaps),
        windows=draw(perhaps),
        state_bytes=draw(perhaps),
        experts=draw(st.one_of(st.just(()), experts)),
        head_flops=draw(SIZES),
        compute_scale=draw(st.sampled_from((0.001, 1.0, 1000.0))),
        hidden_size=draw(SIZES),
        activation_bytes=draw(st.integers(1, 16)),
        context=draw(SIZES),
    )


@st.composite
def all_inputs(draw: st.DrawFn) -> PlanInputs:
    names = "abc"[: draw(st.integers(1, 3))]
    layers = st.integers(0, 6)
    measured = st.one_of(st.none(), st.builds(Measured, layers, layers, SECONDS, SECONDS))
    offers = [
        NodeOffer(
            name,
            memory=draw(SIZES),
            tflops=draw(SPEEDS),
            bandwidth=draw(SPEEDS),
            max_layers=draw(st.one_of(st.none(), SIZES)),
            measured=draw(measured),
            taken=draw(SIZES),
        )
        for name in names
    ]
    ends = st.sampled_from(names)
    links = draw(st.lists(st.builds(Link, ends, ends, SECONDS, SPEEDS), max_size=4))
    return PlanInputs(
        model=draw(costs()), offers=tuple(offers), settings=SETTINGS, links=tuple(links)
    )


@settings(max_examples=100, deadline=None)
@given(all_inputs())
def test_no_figures_keep_a_plan_from_being_made(inputs: PlanInputs) -> None:
    assert inputs.model.is_consistent
    with np.errstate(all="ignore"):
        plan = decide(Basis(inputs=inputs, rebalance=True, second=True)).plan
    nodes = [stage.node for line in plan.pipelines for stage in line.stages]
    assert len(set(nodes)) == len(nodes)
    assert bool(plan.pipelines) != (plan.shortage is not None)
