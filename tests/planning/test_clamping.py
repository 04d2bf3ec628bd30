from collections.abc import Sequence
from itertools import combinations, pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.capacity import Budget, StageSizes, budget
from pxd.planning.classic.clamping import clamp, reaches_end
from pxd.planning.model import ModelCost, NodeOffer
from tests.planning.allocations import SETTINGS, models, offers


def every_cut(sizes: StageSizes, rooms: Sequence[Budget]) -> list[list[tuple[int, int]]]:
    """All the ways in which these stages can hold the model, by trying every set of boundaries."""
    inner = combinations(sizes.cuts[1:-1], len(rooms) - 1)
    ways = [list(pairwise((0, *ends, sizes.model.layers))) for ends in inner]
    return [w for w in ways if all(sizes.fits(r, *s) for r, s in zip(rooms, w, strict=True))]


def sizes_of(*layer_bytes: int) -> StageSizes:
    layers = len(layer_bytes)
    model = ModelCost(
        layer_bytes=layer_bytes,
        embedding_bytes=0,
        head_bytes=0,
        tied=False,
        kv_bytes_per_token=(0,) * layers,
        splits=tuple(range(1, layers)),
    )
    return StageSizes(model, 0)


def rooms_of(*weights: int) -> list[Budget]:
    return [Budget(size, 0, 99) for size in weights]


def test_targets_that_fit_stay() -> None:
    sizes, rooms = sizes_of(*[1] * 9), rooms_of(5, 5, 5)
    assert clamp(sizes, rooms, [2, 5, 9]) == [(0, 2), (2, 5), (5, 9)]


def test_targets_move_no_farther_than_they_must() -> None:
    sizes = sizes_of(*[1] * 9)
    assert clamp(sizes, rooms_of(2, 5, 5), [4, 6, 9]) == [(0, 2), (2, 6), (6, 9)]
    assert clamp(sizes, rooms_of(9, 5, 2), [3, 6, 9]) == [(0, 3), (3, 7), (7, 9)]
    assert clamp(sizes, rooms_of(9, 9, 9), [0, 0, 9]) == [(0, 1), (1, 2), (2, 9)]


@settings(max_examples=300, deadline=None)
@given(models(8), offers(4), st.data())
def test_sound_and_complete_where_every_node_can_hold_every_piece(
    cost: ModelCost, nodes: list[NodeOffer], data: st.DataObject
) -> None:
    sizes = StageSizes(cost, SETTINGS.min_kv_tokens)
    rooms = [budget(node, cost, SETTINGS) for node in nodes] or rooms_of(0)
    goal = len(sizes.cuts) - 1
    targets = sorted(data.draw(st.integers(0, goal)) for _ in rooms)
    ways, found = every_cut(sizes, rooms), clamp(sizes, rooms, targets)
    assert found is None or found in ways
    assert reaches_end(sizes, rooms) or not ways
    if all(sizes.fits(room, *piece) for room in rooms for piece in pairwise(sizes.cuts)):
        assert (found is None) == (not ways)
