"""Models and machines for tests of the planner."""

import math
from collections.abc import Sequence
from itertools import chain as joined
from itertools import pairwise

from hypothesis import strategies as st

from pxd.planning.links import Link
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings
from pxd.planning.result import ClusterPlan, PlanInputs, Workload

GIB = 1 << 30
SETTINGS = PlanSettings(weight_share=0.75, kv_share=0.2)

MACHINES = {
    "a100-80g": (80, 312.0, 2039.0),
    "a100-40g": (40, 312.0, 1935.0),
    "rtx5090": (32, 165.0, 1792.0),
    "rtx4090": (24, 82.6, 1008.0),
}
"""Name: GiB of memory, TFLOP/s, GB/s."""


def offer(node: str, machine: str) -> NodeOffer:
    memory, tflops, bandwidth = MACHINES[machine]
    return NodeOffer(id=node, memory=memory * GIB, tflops=tflops, bandwidth=bandwidth)


def offers_of(machines: Sequence[str]) -> tuple[NodeOffer, ...]:
    return tuple(offer(f"{name}-{place}", name) for place, name in enumerate(machines))


def model_of(layers: int, layer_gib: float = 2.99, **changes: object) -> ModelCost:
    """A dense model of equal layers; `layer_gib` of each, two bytes a weight."""
    figures: dict[str, object] = {
        "layer_bytes": (int(layer_gib * GIB),) * layers,
        "embedding_bytes": GIB,
        "head_bytes": GIB,
        "tied": False,
        "kv_bytes_per_token": (4096,) * layers,
        "splits": tuple(range(1, layers)),
        "attention_flops": (4 * 4096,) * layers,
        "hidden_size": 4096,
    }
    return ModelCost(**{**figures, **changes})  # type: ignore[arg-type]


def inputs_of(
    model: ModelCost,
    offers: Sequence[NodeOffer],
    links: Sequence[Link] = (),
    workload: Workload | None = None,
) -> PlanInputs:
    return PlanInputs(
        model=model,
        offers=tuple(offers),
        settings=SETTINGS,
        links=tuple(links),
        workload=workload or Workload(),
    )


@st.composite
def random_offers(draw: st.DrawFn, least: int = 1, most: int = 7) -> tuple[NodeOffer, ...]:
    """Machines of any size and speed, not only such as exist."""
    count = draw(st.integers(least, most))
    return tuple(
        NodeOffer(
            id=f"node-{place}",
            memory=draw(st.integers(2, 120)) * GIB,
            tflops=draw(st.sampled_from((5.0, 30.0, 82.6, 312.0))),
            bandwidth=draw(st.sampled_from((80.0, 400.0, 1008.0, 2039.0))),
        )
        for place in range(count)
    )


@st.composite
def random_models(draw: st.DrawFn, most_layers: int = 16) -> ModelCost:
    """Equal layers or not; sizes that take from one to many of the machines."""
    layers = draw(st.integers(1, most_layers))
    size = draw(st.sampled_from((0.3, 1.0, 3.0, 6.0)))
    if draw(st.booleans()):
        return model_of(layers, size)
    sizes = draw(st.lists(st.floats(0.2, 2.0), min_size=layers, max_size=layers))
    return model_of(layers, layer_bytes=tuple(int(size * factor * GIB) for factor in sizes))


@st.composite
def random_links(draw: st.DrawFn, offers: Sequence[NodeOffer]) -> tuple[Link, ...]:
    """None at all, or one between every two nodes."""
    if draw(st.booleans()):
        return ()
    rtts = st.sampled_from((0.0002, 0.001, 0.02, 0.15))
    return tuple(
        Link(a.id, b.id, draw(rtts), draw(st.sampled_from((0.01, 0.117, 1.25))))
        for place, a in enumerate(offers)
        for b in offers[:place]
    )


@st.composite
def random_inputs(
    draw: st.DrawFn, least: int = 1, most: int = 6, most_layers: int = 10
) -> PlanInputs:
    offers = draw(random_offers(least, most))
    limit = draw(st.sampled_from((0.5, 0.05)))
    workload = Workload(token_limit_s=limit)
    return inputs_of(draw(random_models(most_layers)), offers, draw(random_links(offers)), workload)


def chains_of(plan: ClusterPlan) -> tuple[Chain, ...]:
    return tuple(pipeline.chain for pipeline in plan.pipelines)


def node_of(machines: Sequence[NodeOffer], node: str) -> NodeOffer:
    return next(offer for offer in machines if offer.id == node)


def check_plan(inputs: PlanInputs, plan: ClusterPlan) -> None:
    """Pipelines cover the model once, nothing is above its memory, every node has one place."""
    model = inputs.model
    for chain in chains_of(plan):
        assert (chain[0][1], chain[-1][2]) == (0, model.layers)
        assert all(left[2] == right[1] for left, right in pairwise(chain))
        for node, start, end in chain:
            check_memory(inputs, node, start, end)
    for spare in plan.spares:
        if spare.end:
            check_memory(inputs, spare.node, spare.start, spare.end)
    placed = [node for node, _, _ in joined(*chains_of(plan))]
    placed += [spare.node for spare in plan.spares]
    assert sorted(placed) == sorted(offer.id for offer in inputs.offers)
    assert (plan.shortage is None) == bool(plan.pipelines)


def check_memory(inputs: PlanInputs, node: str, start: int, end: int) -> None:
    model, settings = inputs.model, inputs.settings
    memory = node_of(inputs.offers, node).memory
    weights = sum(model.layer_bytes[start:end])
    weights += model.embedding_bytes * (start == 0) + model.head_bytes * (end == model.layers)
    assert start < end
    assert weights <= math.floor(memory * settings.weight_share)
    kv = sum(model.kv_bytes_per_token[start:end]) * settings.min_kv_tokens
    assert kv <= math.floor(memory * settings.kv_share)
