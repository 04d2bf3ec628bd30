"""What changes when the cluster does, and what does not."""

import math
import random
from itertools import combinations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.auto.redundancy import REDUNDANCY_SHARE
from pxd.planning.links import Link
from pxd.planning.model import Chain
from pxd.planning.planner import plan_cluster
from pxd.planning.replan import INSERT_GAIN, REBALANCE_GAIN, Replan, decide, objective_of, replan
from pxd.planning.result import Basis, ClusterPlan, PlanInputs, Strategy, Workload
from tests.planning.clusters import (
    GIB,
    chains_of,
    check_plan,
    inputs_of,
    model_of,
    offer,
    offers_of,
    random_inputs,
)

ROUNDING = 1 + 1e-6


def without(inputs: PlanInputs, node: str) -> PlanInputs:
    offers = tuple(offer for offer in inputs.offers if offer.id != node)
    return msgspec.structs.replace(inputs, offers=offers)


def weights(plan: ClusterPlan) -> int:
    return sum(stage.weight_bytes for pipeline in plan.pipelines for stage in pipeline.stages)


def uses(chain: Chain, node: str) -> bool:
    return any(name == node for name, _, _ in chain)


# Five layers and an end fit into one of these cards, so that eight layers take two of them.
EIGHT = model_of(8)
PAIR = inputs_of(EIGHT, offers_of(["rtx4090"] * 2))
TRIO = inputs_of(EIGHT, offers_of(["rtx4090"] * 3))
# Room for few requests at once: with fewer layers on each card there would be room for more.
CROWDED = inputs_of(model_of(10, kv_bytes_per_token=(128 * 1024,) * 10), PAIR.offers)

pytestmark = pytest.mark.slow


def test_the_first_plan_is_that_of_plan_cluster_and_moves_all_of_it() -> None:
    result = replan((), PAIR)
    assert result.move.plan == plan_cluster(PAIR)
    assert result.move.gain == math.inf
    assert result.move.moved_bytes == sum(EIGHT.layer_bytes) + 2 * GIB == weights(result.move.plan)
    assert result.rebalance is None


def test_nothing_changes_where_nothing_changed() -> None:
    previous = chains_of(plan_cluster(TRIO))
    result = replan(previous, TRIO)
    assert chains_of(result.move.plan) == previous
    assert (result.move.gain, result.move.moved_bytes, result.rebalance) == (0, 0, None)


@settings(max_examples=75, deadline=None)
@given(random_inputs(), st.data())
def test_a_death_leaves_pipelines_without_that_node_as_they_are(
    inputs: PlanInputs, data: st.DataObject
) -> None:
    plan = plan_cluster(inputs)
    dead = data.draw(st.sampled_from([offer.id for offer in inputs.offers]))
    left = without(inputs, dead)
    after = replan(chains_of(plan), left, spares=plan.spares).move.plan
    check_plan(left, after)
    healthy = {each for each in plan.pipelines if not uses(each.chain, dead)}
    assert healthy <= set(after.pipelines)


@settings(max_examples=75, deadline=None)
@given(random_inputs())
def test_join_and_then_leave_restores_the_plan_unless_the_join_changed_it(
    inputs: PlanInputs,
) -> None:
    joining = inputs.offers[-1].id
    before = plan_cluster(without(inputs, joining))
    grown = replan(chains_of(before), inputs, spares=before.spares).move.plan
    check_plan(inputs, grown)
    assert grown.objective * ROUNDING >= before.objective
    left = replan(chains_of(grown), without(inputs, joining), spares=grown.spares)
    if set(chains_of(before)) <= set(chains_of(grown)):
        assert set(chains_of(left.move.plan)) == set(chains_of(before))
    else:
        after = left.rebalance.plan if left.rebalance is not None else left.move.plan
        assert after.objective * (1 + REBALANCE_GAIN) >= before.objective


@settings(max_examples=75, deadline=None)
@given(random_inputs(), st.sampled_from(("greedy", "dp")))
def test_a_plan_from_scratch_is_offered_only_where_it_gains_a_lot_or_divides_a_lone_chain(
    inputs: PlanInputs, strategy: Strategy
) -> None:
    before = plan_cluster(inputs, strategy)
    result = replan(chains_of(before), inputs)
    kept, best = result.move.plan, plan_cluster(inputs)
    assert kept.objective * ROUNDING >= before.objective
    gains = best.objective > kept.objective * (1 + REBALANCE_GAIN)
    divides = len(best.pipelines) > 1 == len(kept.pipelines)
    near = best.objective >= kept.objective * (1 - REDUNDANCY_SHARE)
    assert (result.rebalance is not None) == (gains or (divides and near))
    if result.rebalance is not None:
        assert chains_of(result.rebalance.plan) == chains_of(best)
        assert result.rebalance.gain == pytest.approx(best.objective / kept.objective - 1)


@settings(max_examples=50, deadline=None)
@given(random_inputs())
def test_the_objective_of_pipelines_is_that_of_their_plan(inputs: PlanInputs) -> None:
    plan = plan_cluster(inputs)
    assert objective_of(inputs, chains_of(plan)) == pytest.approx(plan.objective)


def test_no_objective_without_memory_or_without_the_node() -> None:
    for chain in (
        (("rtx4090-0", 0, 7), ("rtx4090-1", 7, 8)),
        (("rtx4090-0", 0, 4), ("somebody", 4, 8)),
        (("rtx4090-0", 0, 4), ("rtx4090-0", 4, 8)),
        (("rtx4090-0", 0, 4),),
        (("rtx4090-0", 0, 3), ("rtx4090-1", 4, 8)),
    ):
        with pytest.raises(ValueError, match="cannot serve"):
            objective_of(PAIR, [chain])


def test_a_small_gain_is_not_worth_loading_anything() -> None:
    uneven = ((("rtx4090-0", 0, 5), ("rtx4090-1", 5, 8)),)
    best = plan_cluster(PAIR).objective
    assert 1 < best / objective_of(PAIR, uneven) < 1 + REBALANCE_GAIN
    result = replan(uneven, PAIR)
    assert chains_of(result.move.plan) == uneven
    assert (result.move.moved_bytes, result.rebalance) == (0, None)


def test_a_large_gain_is_offered_beside_what_is_to_be_done() -> None:
    offers = offers_of(["a100-80g"] * 2)
    inputs = inputs_of(model_of(20), offers)
    uneven = ((("a100-80g-0", 0, 19), ("a100-80g-1", 19, 20)),)
    result = replan(uneven, inputs)
    assert chains_of(result.move.plan) == uneven
    assert result.rebalance is not None
    assert result.rebalance.gain > REBALANCE_GAIN
    # The second node has to load what the first no longer serves.
    ((first, second),) = chains_of(result.rebalance.plan)
    assert (first[1], second[2]) == (0, 20)
    moved = sum(inputs.model.layer_bytes[second[1] : 19])
    assert result.rebalance.moved_bytes == moved


def joined(previous: PlanInputs, machine: str, *, grow: bool = True) -> Replan:
    """What a new machine changes; `previous` is where it is missing."""
    inputs = msgspec.structs.replace(previous, offers=(*previous.offers, offer("new", machine)))
    return replan(chains_of(plan_cluster(previous)), inputs, grow=grow)


def test_a_node_that_makes_a_pipeline_much_faster_is_put_into_it() -> None:
    move = joined(CROWDED, "rtx4090").move
    assert move.gain >= INSERT_GAIN
    (chain,) = chains_of(move.plan)
    assert uses(chain, "new")
    assert 0 < move.moved_bytes < weights(move.plan)


def test_without_growth_it_stands_by() -> None:
    result = joined(CROWDED, "rtx4090", grow=False)
    assert not any(uses(chain, "new") for chain in chains_of(result.move.plan))
    assert (result.move.gain, result.move.moved_bytes, result.rebalance) == (0, 0, None)
    assert [spare.node for spare in result.move.plan.spares] == ["new"]


def test_a_pipeline_that_gains_little_is_left_alone() -> None:
    # Of two layers on the fastest card, a second card can only take one at the price of a hop.
    inputs = inputs_of(model_of(2), (offer("old", "a100-80g"),), workload=Workload(max_requests=1))
    result = joined(inputs, "rtx4090")
    assert (("old", 0, 2),) in chains_of(result.move.plan)


def test_a_new_pipeline_needs_no_interruption() -> None:
    previous = chains_of(plan_cluster(PAIR))
    fourth = inputs_of(EIGHT, offers_of(["rtx4090"] * 4))
    for grow in (False, True):
        move = replan(previous, fourth, grow=grow).move
        assert set(previous) < set(chains_of(move.plan))
        assert move.gain == pytest.approx(1)
        assert move.moved_bytes == weights(move.plan) - weights(plan_cluster(PAIR))


def test_a_spare_that_holds_the_lost_layers_takes_over_without_loading() -> None:
    plan = plan_cluster(TRIO)
    (chain,), (spare,) = chains_of(plan), plan.spares
    lost = next(node for node, start, end in chain if (start, end) == (spare.start, spare.end))
    move = replan([chain], without(TRIO, lost), spares=[spare]).move
    taken = tuple((spare.node if node == lost else node, a, b) for node, a, b in chain)
    assert chains_of(move.plan) == (taken,)
    assert (move.gain, move.moved_bytes) == (math.inf, 0)


def test_another_spare_loads_what_was_lost_and_no_more() -> None:
    plan = plan_cluster(TRIO)
    (chain,) = chains_of(plan)
    for lost, start, end in chain:
        after = replan([chain], without(TRIO, lost)).move
        lost_bytes = sum(EIGHT.layer_bytes[start:end]) + GIB
        assert after.moved_bytes == lost_bytes
        assert weights(after.plan) == weights(plan)


def test_a_spare_can_stand_in_for_a_node_where_links_differ() -> None:
    links = tuple(
        Link(a.id, b.id, 0.001 * (1 + place), 0.117)
        for place, (a, b) in enumerate(combinations(TRIO.offers, 2))
    )
    inputs = msgspec.structs.replace(TRIO, links=links)
    plan = plan_cluster(inputs)
    (chain,), (spare,) = chains_of(plan), plan.spares
    lost = next(node for node, start, end in chain if (start, end) == (spare.start, spare.end))
    assert replan([chain], without(inputs, lost), spares=[spare]).move.moved_bytes == 0


def test_a_node_that_offers_less_memory_is_as_good_as_lost() -> None:
    previous = chains_of(plan_cluster(TRIO))
    ((shrunk, _, _), (other, _, _)) = previous[0]
    offers = tuple(
        msgspec.structs.replace(offer, memory=2 * GIB) if offer.id == shrunk else offer
        for offer in TRIO.offers
    )
    (chain,) = chains_of(replan(previous, msgspec.structs.replace(TRIO, offers=offers)).move.plan)
    assert not uses(chain, shrunk)
    assert uses(chain, other)


def test_when_too_little_is_left_there_is_a_shortage() -> None:
    previous = chains_of(plan_cluster(PAIR))
    move = replan(previous, without(PAIR, "rtx4090-0")).move
    assert move.plan.pipelines == ()
    assert move.plan.shortage is not None
    assert (move.gain, move.moved_bytes) == (0, 0)


def test_pipelines_of_another_model_are_planned_anew() -> None:
    previous = chains_of(plan_cluster(PAIR))
    other = msgspec.structs.replace(PAIR, model=model_of(9))
    assert chains_of(replan(previous, other).move.plan) == chains_of(plan_cluster(other))


def basis_of(inputs: PlanInputs, *, rebalance: bool) -> Basis:
    """After the first node's death, with the second best plan before it."""
    before = plan_cluster(inputs, "greedy")
    left = without(inputs, inputs.offers[0].id)
    previous, spares = chains_of(before), before.spares
    return Basis(inputs=left, previous=previous, spares=spares, rebalance=rebalance)


@settings(max_examples=50, deadline=None)
@given(random_inputs(), st.booleans(), st.randoms(use_true_random=False))
def test_everybody_decides_the_same(
    inputs: PlanInputs, rebalance: bool, shuffler: random.Random
) -> None:
    basis = basis_of(inputs, rebalance=rebalance)
    received = msgspec.msgpack.decode(msgspec.msgpack.encode(basis), type=Basis)
    assert received == basis
    decided = decide(basis)
    assert decide(received) == decided
    offers, links, spares = list(inputs.offers[1:]), list(inputs.links), list(basis.spares)
    for each in (offers, links, spares):
        shuffler.shuffle(each)
    shuffled = Basis(
        inputs=msgspec.structs.replace(basis.inputs, offers=tuple(offers), links=tuple(links)),
        previous=basis.previous,
        spares=tuple(spares),
        rebalance=rebalance,
    )
    assert decide(shuffled) == decided


@settings(max_examples=20, deadline=None)
@given(random_inputs(), st.data())
def test_other_bandwidths_and_distances_alone_move_nothing(
    inputs: PlanInputs, data: st.DataObject
) -> None:
    plan = plan_cluster(inputs)
    names = [offer.id for offer in inputs.offers]
    rtts, bandwidths = st.floats(0, 1), st.floats(0, 100)
    links = tuple(
        Link(a, b, data.draw(rtts), data.draw(bandwidths)) for a, b in combinations(names, 2)
    )
    measured = msgspec.structs.replace(inputs, links=links)
    basis = Basis(inputs=measured, previous=chains_of(plan), spares=plan.spares)
    after = decide(basis).plan
    assert chains_of(after) == chains_of(plan)
    assert after.spares == plan.spares


def test_a_rebalance_is_taken_only_if_it_is_asked_for() -> None:
    inputs = inputs_of(model_of(20), offers_of(["a100-80g"] * 2))
    uneven = ((("a100-80g-0", 0, 19), ("a100-80g-1", 19, 20)),)
    result = replan(uneven, inputs)
    assert (
        decide(Basis(inputs=inputs, previous=uneven)).plan.pipelines == result.move.plan.pipelines
    )
    assert decide(Basis(inputs=inputs, previous=uneven, rebalance=True)) == result.rebalance


@pytest.mark.parametrize("strategy", ["greedy", "dp"])
def test_the_classic_strategies_keep_what_is_well_too(strategy: Strategy) -> None:
    four = inputs_of(EIGHT, offers_of(["rtx4090"] * 4))
    plan = plan_cluster(four, strategy)
    previous = chains_of(plan)
    assert len(previous) == 2
    dead = previous[0][0][0]
    result = replan(previous, without(four, dead), strategy)
    assert chains_of(result.move.plan) == previous[1:]
    back = replan(chains_of(result.move.plan), four, strategy)
    assert {name for chain in chains_of(back.move.plan) for name, _, _ in chain} == {
        offer.id for offer in four.offers
    }
