"""Two pipelines rather than one that is a little faster: a death is then a short pause."""

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.auto.improve import Improver
from pxd.planning.auto.partition import best_partitions
from pxd.planning.auto.problem import Problem
from pxd.planning.auto.redundancy import REDUNDANCY_SHARE, value_of
from pxd.planning.model import Chain, NodeOffer
from pxd.planning.planner import as_cut, describe_plan, plan_cluster
from pxd.planning.replan import REBALANCE_GAIN, decide, objective_of, replan
from pxd.planning.result import Basis, ClusterPlan, PlanInputs, Spare, Strategy, Workload
from tests.planning.brute_force import best_objectives
from tests.planning.clusters import GIB, chains_of, inputs_of, model_of, random_inputs

ROUNDING = 1 + 1e-6
NEAR = 1 - REDUNDANCY_SHARE


def machine(name: str, gib: int, bandwidth: float, **more: int) -> NodeOffer:
    return NodeOffer(name, gib * GIB, 100.0, bandwidth, **more)


# Either holds all twelve layers, but together there is room for more requests.
TWINS = inputs_of(
    model_of(12, 1.0, kv_bytes_per_token=(32 * 1024,) * 12),
    (machine("large", 64, 1000), machine("small", 32, 1000)),
)
# By itself the small one is late, and has room for few requests.
UNEQUAL = inputs_of(
    model_of(12, 1.0, kv_bytes_per_token=(128 * 1024,) * 12),
    (machine("large", 64, 500), machine("small", 24, 200)),
    workload=Workload(token_limit_s=0.05),
)
# The first two have one pipeline. With the third, the small ones can hold the model, too.
GROWING = inputs_of(
    model_of(12, 2.0, kv_bytes_per_token=(128 * 1024,) * 12),
    (machine("large", 64, 500), machine("small", 24, 1000), machine("late", 16, 100)),
)
# All but the fastest two together are late.
HASTY = inputs_of(
    model_of(12, 1.0, kv_bytes_per_token=(32 * 1024,) * 12),
    (machine("large", 32, 500), machine("slow", 16, 50), machine("fast", 8, 1000)),
    workload=Workload(token_limit_s=0.02),
)
APART = ((("large", 0, 12),), (("small", 0, 12),))


def machines_of(inputs: PlanInputs, *offers: NodeOffer) -> PlanInputs:
    return msgspec.structs.replace(inputs, offers=offers)


def best_plans(inputs: PlanInputs) -> list[tuple[Chain, ...]]:
    """The best plan, which must be one pipeline, and the best with more."""
    problem = Problem(inputs)
    plans = [
        describe_plan(problem, cuts) for cuts in best_partitions(problem, range(len(problem.nodes)))
    ]
    assert [len(plan.pipelines) for plan in plans] == [1, 2]
    return [chains_of(plan) for plan in plans]


def best_chain(inputs: PlanInputs) -> tuple[Chain, ...]:
    return best_plans(inputs)[0]


def test_two_pipelines_win_over_one_that_is_a_little_faster() -> None:
    plan, alone = plan_cluster(TWINS), objective_of(TWINS, best_chain(TWINS))
    assert chains_of(plan) == APART
    assert alone * NEAR < plan.objective < alone


def test_and_lose_where_one_is_much_faster() -> None:
    plan = plan_cluster(UNEQUAL)
    assert chains_of(plan) == best_chain(UNEQUAL)
    assert objective_of(UNEQUAL, APART) < plan.objective * NEAR


@pytest.mark.parametrize("inputs", [TWINS, UNEQUAL, GROWING, HASTY])
def test_trying_everything_finds_nothing_better(inputs: PlanInputs) -> None:
    found = [objective_of(inputs, plan) for plan in best_plans(inputs)]
    assert found == pytest.approx(best_objectives(Problem(inputs)), rel=0.02)


def test_a_third_pipeline_counts_for_no_more_than_its_tokens() -> None:
    third = machines_of(TWINS, *TWINS.offers, machine("third", 64, 1000))
    apart = tuple(((offer.id, 0, 12),) for offer in third.offers)
    plan = plan_cluster(third)
    assert len(plan.pipelines) == 2
    assert plan.objective > objective_of(third, apart) > plan.objective * NEAR


def test_beside_another_pipeline_the_second_counts_for_no_more_either() -> None:
    third = machines_of(TWINS, *TWINS.offers, machine("third", 64, 1000))
    kept = (("third", 0, 12),)
    [first, second] = chains_of(replan([kept], third, grow=False).move.plan)
    assert kept in (first, second)
    assert {kept, *APART} != {first, second}
    assert len({name for chain in (first, second) for name, _, _ in chain}) == 3


@pytest.mark.parametrize(("inputs", "pipelines"), [(TWINS, 2), (UNEQUAL, 1)])
def test_the_search_makes_the_last_two_one_only_for_much(
    inputs: PlanInputs, pipelines: int
) -> None:
    problem = Problem(inputs)
    apart = [as_cut(problem, chain) for chain in APART]
    improved = Improver(problem, range(2)).improve(apart, 10_000_000)
    assert len(improved) == pipelines
    assert pipelines == 2 or value_of(improved) * NEAR > value_of(apart)


def grown(inputs: PlanInputs, previous: tuple[Chain, ...], *spares: Spare) -> ClusterPlan:
    return decide(Basis(inputs=inputs, previous=previous, spares=spares, rebalance=True)).plan


def test_a_lone_chain_is_divided_once_another_node_makes_two_possible() -> None:
    first = plan_cluster(machines_of(GROWING, *GROWING.offers[:2]))
    [chain] = chains_of(first)
    assert len(chain) == 2
    plan = grown(GROWING, chains_of(first))
    assert [len(chain) for chain in chains_of(plan)] == [1, 2]
    assert grown(GROWING, chains_of(plan)).pipelines == plan.pipelines


def test_even_if_that_is_a_little_slower_but_not_if_it_is_much() -> None:
    lone = best_chain(TWINS)
    result = replan(lone, TWINS)
    assert chains_of(result.move.plan) == lone
    assert result.rebalance is not None
    assert -REDUNDANCY_SHARE < result.rebalance.gain < 0
    assert chains_of(result.rebalance.plan) == APART
    assert replan(best_chain(UNEQUAL), UNEQUAL).rebalance is None


def test_a_second_pipeline_is_given_up_only_for_what_other_rebalances_gain() -> None:
    gain = plan_cluster(UNEQUAL).objective / objective_of(UNEQUAL, APART) - 1
    assert 1 / NEAR - 1 < gain < REBALANCE_GAIN
    assert replan(APART, UNEQUAL).rebalance is None
    best, several = best_plans(HASTY)
    result = replan(several, HASTY)
    assert result.rebalance is not None
    assert result.rebalance.gain > REBALANCE_GAIN
    assert chains_of(result.rebalance.plan) == best


def test_what_serves_at_once_is_mended_first_and_divided_then() -> None:
    [((large, _, middle), (small, _, end))] = best_chain(TWINS)
    broken, mended = ((large, 0, middle), ("lost", middle, end)), best_chain(TWINS)
    move = replan([broken], TWINS, spares=[Spare(small, middle, end)], grow=False).move
    assert (chains_of(move.plan), move.moved_bytes) == (mended, 0)
    assert chains_of(grown(TWINS, mended)) == APART
    assert chains_of(replan([broken], TWINS, grow=False).move.plan) == APART


def second(inputs: PlanInputs, *previous: Chain) -> ClusterPlan:
    return decide(Basis(inputs=inputs, previous=previous, second=True)).plan


def test_a_look_for_a_second_pipeline_compares_it_with_what_is_served() -> None:
    served = (("large", 0, 4), ("small", 4, 12))
    best, several = objective_of(UNEQUAL, best_chain(UNEQUAL)), objective_of(UNEQUAL, APART)
    assert several < best * NEAR
    assert several > objective_of(UNEQUAL, [served]) * NEAR
    assert len(grown(UNEQUAL, (served,)).pipelines) == 1
    assert chains_of(second(UNEQUAL, served)) == APART
    assert chains_of(second(UNEQUAL, *best_chain(UNEQUAL))) == best_chain(UNEQUAL)


def test_and_changes_nothing_else() -> None:
    served = (("large", 0, 8), ("small", 8, 12))
    alone = machines_of(UNEQUAL, UNEQUAL.offers[0], machine("small", 24, 200, max_layers=6))
    assert len(plan_cluster(alone).pipelines) == 1
    assert plan_cluster(alone).objective > objective_of(alone, [served]) * (1 + REBALANCE_GAIN)
    assert chains_of(second(alone, served)) == (served,)
    assert chains_of(second(HASTY, *best_plans(HASTY)[1])) == best_plans(HASTY)[1]


@settings(max_examples=40, deadline=None)
@given(random_inputs(most=4, most_layers=6), st.sampled_from(("greedy", "dp")))
def test_looking_again_and_again_comes_to_an_end(inputs: PlanInputs, strategy: Strategy) -> None:
    plan = plan_cluster(inputs, strategy)
    for _ in range(2 * len(inputs.offers)):
        after = grown(inputs, chains_of(plan), *plan.spares)
        if len(after.pipelines) == 1 < len(plan.pipelines):
            assert after.objective > plan.objective * (1 + REBALANCE_GAIN)
        if chains_of(after) == chains_of(plan):
            break
        plan = after
    else:
        pytest.fail("it goes on for ever")
