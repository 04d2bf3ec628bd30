"""Where nodes that no pipeline needs stand by."""

from collections.abc import Sequence

from pxd.planning.auto.problem import Problem
from pxd.planning.model import Chain, ModelCost, NodeOffer
from pxd.planning.planner import as_cut
from pxd.planning.spares import Held, stand_by
from tests.planning.clusters import GIB, inputs_of, model_of, offer

EIGHT = model_of(8)
PAIR: Chain = (("a", 0, 4), ("b", 4, 8))
HELD: Held = {}


def standing(
    chains: Sequence[Chain],
    spares: Sequence[NodeOffer],
    held: Held = HELD,
    model: ModelCost = EIGHT,
) -> dict[str, tuple[int, int]]:
    """What the spares hold beside pipelines of cards that hold five layers each."""
    used = [offer(node, "rtx4090") for chain in chains for node, _, _ in chain]
    problem = Problem(inputs_of(model, (*used, *spares)))
    cuts = [as_cut(problem, chain) for chain in chains]
    found = stand_by(problem, cuts, [spare.id for spare in spares], held)
    return {spare.node: (spare.start, spare.end) for spare in found}


def card(node: str) -> NodeOffer:
    return offer(node, "rtx4090")


def test_every_stage_gets_one_before_any_gets_two() -> None:
    found = standing([PAIR], [card("x"), card("y")])
    assert sorted(found.values()) == [(0, 4), (4, 8)]
    found = standing([PAIR], [card("w"), card("x"), card("y"), card("z")])
    assert sorted(found.values()) == [(0, 4), (0, 4), (4, 8), (4, 8)]


def test_the_stage_with_most_bytes_comes_first() -> None:
    assert standing([(("a", 0, 3), ("b", 3, 8))], [card("x")]) == {"x": (3, 8)}
    assert standing([(("a", 0, 5), ("b", 5, 8))], [card("x")]) == {"x": (0, 5)}


def test_a_pipeline_with_more_tokens_per_second_comes_first() -> None:
    uneven: Chain = (("c", 0, 5), ("d", 5, 8))
    assert standing([uneven, PAIR], [card("x")]) == {"x": (0, 4)}


def test_who_holds_a_range_goes_on_doing_so() -> None:
    for held in ((0, 4), (4, 8)):
        assert standing([PAIR], [card("x")], {"x": held}) == {"x": held}
    assert standing([PAIR], [card("x"), card("y")], {"y": (0, 4)}) == {"x": (4, 8), "y": (0, 4)}


def test_who_holds_what_is_no_longer_of_use_stands_by_as_others_do() -> None:
    assert standing([PAIR], [card("x")], {"x": (2, 6)}) == standing([PAIR], [card("x")])


def test_small_nodes_stand_by_for_stages_that_they_can_hold() -> None:
    short: Chain = (("a", 0, 5), ("b", 5, 7), ("c", 7, 8))
    small = NodeOffer("small", 6 * GIB, 50.0, 500.0)
    tiny = NodeOffer("tiny", GIB, 50.0, 500.0)
    assert standing([short], [small, tiny]) == {"small": (7, 8), "tiny": (0, 0)}


def test_without_pipelines_there_is_nothing_to_stand_by_for() -> None:
    assert standing([], [card("x")]) == {"x": (0, 0)}
