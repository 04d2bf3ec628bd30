"""What holds for whatever an allocator returns, and inputs for it."""

import random
from collections.abc import Callable, Sequence
from itertools import chain as joined
from itertools import pairwise

from hypothesis import strategies as st

from pxd.planning.capacity import StageSizes, budget
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings

SETTINGS = PlanSettings(weight_share=0.5, kv_share=0.3, min_kv_tokens=2)
Allocator = Callable[[ModelCost, Sequence[NodeOffer], PlanSettings], tuple[Chain, ...]]


def check(model: ModelCost, offers: Sequence[NodeOffer], chains: Sequence[Chain]) -> None:
    """Every chain covers the model once, no node is used twice or above its memory."""
    rooms = {offer.id: budget(offer, model, SETTINGS) for offer in offers}
    sizes = StageSizes(model, SETTINGS.min_kv_tokens)
    nodes = [node for node, _, _ in joined(*chains)]
    assert len(set(nodes)) == len(nodes)
    for chain in chains:
        assert (chain[0][1], chain[-1][2]) == (0, model.layers)
        assert all(left[2] == right[1] for left, right in pairwise(chain))
        assert all(
            start < end and sizes.fits(rooms[node], start, end) for node, start, end in chain
        )
        assert {end for _, _, end in chain} <= {*model.splits, model.layers}


def assert_order_does_not_matter(
    allocate: Allocator, model: ModelCost, offers: Sequence[NodeOffer], shuffler: random.Random
) -> None:
    shuffled = list(offers)
    shuffler.shuffle(shuffled)
    assert allocate(model, shuffled, SETTINGS) == allocate(model, offers, SETTINGS)


@st.composite
def models(draw: st.DrawFn, most: int = 12) -> ModelCost:
    """Equal layers or not, ends of any size, cut anywhere or only in places."""
    layers = draw(st.integers(1, most))
    sizes = draw(st.lists(st.integers(1, 12), min_size=layers, max_size=layers))
    if draw(st.booleans()):
        sizes = [sizes[0]] * layers
    anywhere = tuple(range(1, layers))
    return ModelCost(
        layer_bytes=tuple(sizes),
        embedding_bytes=draw(st.integers(0, 12)),
        head_bytes=draw(st.integers(0, 12)),
        tied=draw(st.booleans()),
        kv_bytes_per_token=(draw(st.integers(0, 2)),) * layers,
        splits=tuple(cut for cut in anywhere if draw(st.integers(0, 9))),
    )


def offers(most: int = 12) -> st.SearchStrategy[list[NodeOffer]]:
    rows = st.tuples(st.integers(0, 160), st.floats(0, 10), st.one_of(st.none(), st.integers(0, 6)))
    return st.lists(rows, max_size=most).map(
        lambda drawn: [
            NodeOffer(f"n{place}", memory, tflops, 0.0, limit)
            for place, (memory, tflops, limit) in enumerate(drawn)
        ]
    )


@st.composite
def with_small_ends(draw: st.DrawFn, most: int = 7) -> tuple[ModelCost, list[NodeOffer]]:
    """Equal layers, ends of no more than one each, and no other limits: as in the vectors."""
    layers, size = draw(st.integers(2, 14)), draw(st.integers(4, 12))
    model = ModelCost(
        layer_bytes=(size,) * layers,
        embedding_bytes=draw(st.integers(0, size)),
        head_bytes=draw(st.integers(0, size)),
        tied=False,
        kv_bytes_per_token=(0,) * layers,
        splits=tuple(range(1, layers)),
    )
    capacities = draw(st.lists(st.integers(2, layers + 1), min_size=1, max_size=most))
    rests = draw(st.integers(0, size - 1))
    return model, [
        NodeOffer(f"n{place}", 2 * (capacity * size + rests), 10.0)
        for place, capacity in enumerate(capacities)
    ]
