import random
from itertools import pairwise, permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.capacity import Budget, StageSizes, budget
from pxd.planning.model import Allocation, ModelCost, NodeOffer, PlanSettings, Shortage
from pxd.planning.pipeline import plan_pipeline

HALVES = PlanSettings(weight_share=0.5, kv_share=0.5, min_kv_tokens=4)


def model(
    *layer_bytes: int,
    embedding: int = 0,
    head: int = 0,
    tied: bool = False,
    kv: int = 0,
    splits: tuple[int, ...] | None = None,
) -> ModelCost:
    layers = len(layer_bytes)
    return ModelCost(
        layer_bytes=layer_bytes,
        embedding_bytes=embedding,
        head_bytes=head,
        tied=tied,
        kv_bytes_per_token=(kv,) * layers,
        splits=tuple(range(1, layers)) if splits is None else splits,
    )


def offers(*weights: int, tflops: float = 1.0) -> list[NodeOffer]:
    """Nodes a, b, c … that hold that many bytes of weights under HALVES."""
    return [NodeOffer(chr(97 + i), 2 * size, tflops) for i, size in enumerate(weights)]


def plan(cost: ModelCost, nodes: list[NodeOffer], **more: object) -> Allocation:
    found = plan_pipeline(cost, nodes, HALVES, **more)  # type: ignore[arg-type]
    assert isinstance(found, Allocation), found
    check(cost, nodes, found)
    return found


def check(cost: ModelCost, nodes: list[NodeOffer], found: Allocation) -> None:
    """Whatever is planned covers the model once and fits, by a recount from the raw figures."""
    by_id = {node.id: node for node in nodes}
    assert found.stages[0].start == 0
    assert found.stages[-1].end == cost.layers
    assert all(left.end == right.start for left, right in pairwise(found.stages))
    assert len({stage.node for stage in found.stages}) == len(found.stages)
    for stage in found.stages:
        node = by_id[stage.node]
        assert stage.start < stage.end
        assert stage.end == cost.layers or stage.end in cost.splits
        assert node.max_layers is None or stage.end - stage.start <= node.max_layers
        layers = sum(cost.layer_bytes[stage.start : stage.end])
        first, last = stage.start == 0, stage.end == cost.layers
        ends = cost.embedding_bytes * first + cost.head_bytes * last
        if first and last and cost.tied:
            ends = max(cost.embedding_bytes, cost.head_bytes)
        assert stage.weight_bytes == layers + ends <= node.memory // 2
        kv = sum(cost.kv_bytes_per_token[stage.start : stage.end])
        assert kv * 4 <= stage.kv_bytes == node.memory // 2
        assert stage.kv_tokens == (stage.kv_bytes // kv if kv else 0)


def test_three_nodes_with_room_for_all_split_the_model_evenly() -> None:
    found = plan(model(*[10] * 9, embedding=5, head=5), offers(1000, 1000, 1000))
    assert found.chain == (("a", 0, 3), ("b", 3, 6), ("c", 6, 9))


def test_ranges_follow_compute() -> None:
    nodes = [NodeOffer("a", 2000, 30.0), NodeOffer("b", 2000, 10.0)]
    assert plan(model(*[10] * 8), nodes).chain == (("a", 0, 6), ("b", 6, 8))


def test_even_the_slowest_node_takes_part() -> None:
    nodes = [NodeOffer("a", 2000, 100.0), NodeOffer("b", 2000, 0.01)]
    assert plan(model(*[10] * 8), nodes).chain == (("a", 0, 7), ("b", 7, 8))


def test_a_node_that_was_not_measured_counts_as_average() -> None:
    nodes = [NodeOffer("a", 2000, 0.0), NodeOffer("b", 2000, 10.0)]
    assert plan(model(*[10] * 8), nodes).chain == (("a", 0, 4), ("b", 4, 8))


def test_a_node_without_room_for_a_layer_is_left_out() -> None:
    found = plan(model(*[10] * 4), offers(100, 9, 100))
    assert [stage.node for stage in found.stages] == ["a", "c"]


def test_never_more_stages_than_layers() -> None:
    found = plan(model(10, 10), offers(100, 300, 200))
    assert found.chain == (("b", 0, 1), ("c", 1, 2))


def test_both_ends_are_charged_where_one_node_holds_both() -> None:
    plan(model(10, 10, embedding=7, head=5), offers(32))
    assert isinstance(
        plan_pipeline(model(10, 10, embedding=7, head=5), offers(31), HALVES), Shortage
    )


def test_a_tied_projection_is_charged_once_on_one_node_and_twice_on_two() -> None:
    tied = model(10, 10, embedding=7, head=8, tied=True)
    plan(tied, offers(28))
    assert isinstance(plan_pipeline(tied, offers(27), HALVES), Shortage)
    assert plan(tied, offers(18, 17)).chain == (("b", 0, 1), ("a", 1, 2))
    assert isinstance(plan_pipeline(tied, offers(17, 17), HALVES), Shortage)


def test_only_allowed_cuts() -> None:
    found = plan(model(*[10] * 8, splits=(2, 6)), offers(1000, 1000, 1000))
    assert [(stage.start, stage.end) for stage in found.stages] == [(0, 2), (2, 6), (6, 8)]


def test_layer_limits_count() -> None:
    nodes = [NodeOffer("a", 2000, 1.0, 0.0, 1), NodeOffer("b", 2000, 1.0)]
    assert {(s.node, s.end - s.start) for s in plan(model(*[10] * 6), nodes).stages} == {
        ("a", 1),
        ("b", 5),
    }


def test_kv_room_counts() -> None:
    found = plan_pipeline(model(*[10] * 4, kv=100), offers(1000), HALVES)
    assert isinstance(found, Shortage)
    assert plan(model(*[10] * 4, kv=100), offers(1000, 1000)).kv_tokens == 5


def test_a_tight_case_that_only_one_order_solves() -> None:
    # The canonical order puts the 50 first and the 21 last, where the head does not fit.
    found = plan(model(20, 20, 20, 20, head=30), offers(50, 42, 21))
    assert found.chain[-1][0] == "a"


def test_unequal_layers_that_only_one_cut_solves() -> None:
    found = plan(model(50, 10, 10, 10, 10), offers(50, 40))
    assert found.chain == (("a", 0, 1), ("b", 1, 5))


def test_a_chain_that_still_fits_is_kept() -> None:
    cost, nodes = model(*[10] * 9), offers(1000, 1000, 1000)
    odd = (("c", 0, 1), ("a", 1, 7), ("b", 7, 9))
    assert plan(cost, nodes, previous=odd).chain == odd


def test_a_new_node_changes_the_chain_and_a_useless_one_does_not() -> None:
    cost = model(*[10] * 9)
    odd = (("b", 0, 2), ("a", 2, 9))
    assert plan(cost, offers(1000, 1000, 5), previous=odd).chain == odd
    assert len(plan(cost, offers(1000, 1000, 50), previous=odd).stages) == 3


@pytest.mark.parametrize(
    "broken",
    [
        (("a", 0, 4),),
        (("a", 0, 4), ("gone", 4, 9)),
        (("a", 0, 4), ("a", 4, 9)),
        (("a", 0, 4), ("b", 5, 9)),
        (("a", 0, 4), ("b", 4, 4), ("c", 4, 9)),
        (("a", 1, 4), ("b", 4, 9)),
        (("a", 0, 3), ("b", 3, 9)),
    ],
)
def test_a_chain_that_is_broken_or_no_longer_fits_is_replaced(
    broken: tuple[tuple[str, int, int], ...],
) -> None:
    assert plan(model(*[10] * 9), offers(50, 50), previous=broken).chain != broken


def test_two_offers_of_one_node_are_refused() -> None:
    with pytest.raises(ValueError, match="same node"):
        plan_pipeline(model(10), [NodeOffer("a", 10), NodeOffer("a", 20)], HALVES)


def test_shares_must_make_sense() -> None:
    with pytest.raises(ValueError, match="exceed"):
        PlanSettings(weight_share=0.8, kv_share=0.3)
    with pytest.raises(ValueError, match="positive"):
        PlanSettings(weight_share=0.0, kv_share=0.3)


def brute_force(cost: ModelCost, rooms: list[Budget]) -> bool:
    """Every subset in every order, every stage as every allowed length."""
    sizes = StageSizes(cost, HALVES.min_kv_tokens)

    def finish(order: tuple[Budget, ...], start: int) -> bool:
        if start == cost.layers:
            return True
        return bool(order) and any(
            finish(order[1:], end)
            for end in sizes.cuts
            if end > start and sizes.fits(order[0], start, end)
        )

    return any(finish(order, 0) for order in permutations(rooms)) or any(
        brute_force(cost, rooms[:i] + rooms[i + 1 :]) for i in range(len(rooms))
    )


@st.composite
def small_models(draw: st.DrawFn) -> ModelCost:
    layers = draw(st.integers(1, 6))
    sizes = draw(st.lists(st.integers(1, 12), min_size=layers, max_size=layers))
    if draw(st.booleans()):
        sizes = [sizes[0]] * layers
    cuts = range(1, layers)
    return ModelCost(
        layer_bytes=tuple(sizes),
        embedding_bytes=draw(st.integers(0, 12)),
        head_bytes=draw(st.integers(0, 12)),
        tied=draw(st.booleans()),
        kv_bytes_per_token=tuple(
            draw(st.lists(st.integers(0, 2), min_size=layers, max_size=layers))
        ),
        splits=tuple(draw(st.sets(st.sampled_from(cuts)))) if layers > 1 else (),
    )


small_offers = st.lists(
    st.tuples(st.integers(0, 80), st.floats(0, 10), st.one_of(st.none(), st.integers(0, 4))),
    max_size=4,
).map(
    lambda rows: [
        NodeOffer(f"n{i}", memory, tflops, 0.0, limit)
        for i, (memory, tflops, limit) in enumerate(rows)
    ]
)


@settings(max_examples=400, deadline=None)
@given(small_models(), small_offers, st.randoms(use_true_random=False))
def test_feasible_exactly_when_brute_force_says_so(
    cost: ModelCost, nodes: list[NodeOffer], shuffler: random.Random
) -> None:
    found = plan_pipeline(cost, nodes, HALVES)
    rooms = [budget(node, cost, HALVES) for node in nodes]
    assert isinstance(found, Allocation) == brute_force(cost, rooms)
    if isinstance(found, Allocation):
        check(cost, nodes, found)
        assert plan_pipeline(cost, nodes, HALVES, found.chain) == found
    else:
        assert found.missing_bytes > 0
        assert found.missing_layers > 0
    shuffled = list(nodes)
    shuffler.shuffle(shuffled)
    assert plan_pipeline(cost, shuffled, HALVES) == found


@pytest.mark.parametrize("kinds", [1, 3, 100])
def test_a_hundred_nodes_stay_affordable(kinds: int) -> None:
    """The searched case, with as many memory sizes as `kinds`; work is bounded by the beam."""
    nodes = [NodeOffer(f"n{i:03}", 2 * (30 + i % kinds), 1.0 + i % 7) for i in range(100)]
    cost = model(*[20] * 80, embedding=5, head=5, splits=tuple(range(1, 80)))
    plan(cost, nodes)
    found = plan_pipeline(model(*[70, 60] * 40), nodes, HALVES)
    assert isinstance(found, Shortage)


def test_room_for_all_nodes_even_when_the_smallest_cannot_hold_an_end() -> None:
    found = plan(model(*[10] * 8, embedding=30, head=30), offers(100, 15, 15, 90))
    assert len(found.stages) == 4
    assert {found.stages[0].node, found.stages[-1].node} == {"a", "d"}
