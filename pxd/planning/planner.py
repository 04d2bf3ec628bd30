"""Plans for a whole cluster: how many pipelines, which nodes in which order, with what ranges.

`auto` maximises the sum over pipelines of their peak tokens/s, where a pipeline slower than the
workload's latency bound counts for less; but it takes two pipelines or more rather than one where
that costs no more than `auto.redundancy.REDUNDANCY_SHARE` of the sum. Few nodes, or few kinds of
nodes, are divided exactly; otherwise the classic allocators and groups of near nodes give
beginnings for a local search. The classic allocators' own plans are always among the candidates, so
`auto` is never worse than they, but for what a second pipeline may cost.
"""

from collections.abc import Sequence
from types import MappingProxyType

from pxd.planning.auto.cutting import Cut, best_cuts
from pxd.planning.auto.estimate import estimate, score
from pxd.planning.auto.improve import Improver
from pxd.planning.auto.orders import orders
from pxd.planning.auto.partition import best_partitions, effort_of
from pxd.planning.auto.problem import Problem
from pxd.planning.auto.redundancy import is_redundant, preferred, value_of
from pxd.planning.auto.regions import regions
from pxd.planning.classic.dynamic import dynamic
from pxd.planning.classic.farthest import farthest_chain
from pxd.planning.classic.greedy import greedy
from pxd.planning.classic.ordered import in_order
from pxd.planning.model import Allocation, Chain, StageAllocation
from pxd.planning.result import ClusterPlan, PlanInputs, Strategy
from pxd.planning.shortage import explain_shortage
from pxd.planning.spares import Held, stand_by

EXACT_EFFORT = 12_000_000
"""Up to which nodes are divided exactly; see `auto.partition`."""
SEARCHES = 3
SEARCH_EFFORT = 9_000_000
EFFORT_PER_NODE = 30_000


def plan_cluster(inputs: PlanInputs, strategy: Strategy = "auto") -> ClusterPlan:
    """The plan for `inputs`; without pipelines, if they cannot hold the model even once.

    The same for any order of the offers and links. Raises ValueError for two offers of one node
    and for a model whose figures do not belong together.
    """
    problem = Problem(inputs)
    if strategy == "auto":
        return describe_plan(problem, divide(problem, range(len(problem.nodes))))
    return describe_plan(problem, allocate(problem, range(len(problem.nodes)), strategy))


def plan_chain(inputs: PlanInputs, order: Sequence[str]) -> ClusterPlan:
    """One water-filled pipeline over exactly these nodes in this order.

    Raises ValueError as `plan_cluster`, and for a node that is not offered.
    """
    problem = Problem(inputs)
    offers = {offer.id: offer for offer in inputs.offers}
    unknown = [node for node in order if node not in offers]
    if unknown:
        raise ValueError(f"there is no node {unknown[0]!r} to put into a pipeline")
    chain = in_order(problem.model, [offers[node] for node in order], inputs.settings)
    return describe_plan(problem, [as_cut(problem, chain)] if chain else [])


def divide(problem: Problem, nodes: Sequence[int], *, redundant: bool = True) -> list[Cut]:
    """The pipelines of `auto` over some nodes of the problem, best first.

    Without `redundant` a second pipeline is worth no more than the tokens/s that it adds.
    """
    candidates = _candidates(problem, nodes)
    best = preferred(candidates) if redundant else max(candidates, key=value_of)
    return _best_first(best or _only_chain(problem, nodes))


def divide_in_several(problem: Problem, nodes: Sequence[int]) -> list[Cut]:
    """The best two or more pipelines over some nodes that `divide` comes upon, whatever they cost;
    none if it comes upon none."""
    several = filter(is_redundant, _candidates(problem, nodes))
    return _best_first(max(several, key=value_of, default=[]))


def _candidates(problem: Problem, nodes: Sequence[int]) -> list[list[Cut]]:
    classic = [allocate(problem, nodes, "greedy"), allocate(problem, nodes, "dp")]
    if effort_of(problem, nodes) <= EXACT_EFFORT:
        return [*best_partitions(problem, nodes), *classic]
    improver = Improver(problem, nodes)
    seeds = [*classic, *(_by_region(problem, groups) for groups in regions(problem, nodes))]
    begun = sorted(seeds, key=lambda cuts: (is_redundant(cuts), value_of(cuts)), reverse=True)
    begun = begun[:SEARCHES]
    effort = (SEARCH_EFFORT + EFFORT_PER_NODE * len(nodes)) // len(begun)
    improved = (improver.improve([_recut(improver, cut) for cut in seed], effort) for seed in begun)
    candidates = [*improved, *seeds]
    if effort_of(problem, nodes, thrifty=True) <= EXACT_EFFORT:
        candidates += best_partitions(problem, nodes, thrifty=True)
    return candidates


def _best_first(cuts: Sequence[Cut]) -> list[Cut]:
    return sorted(cuts, key=lambda cut: (-cut.value, cut.order))


def allocate(problem: Problem, nodes: Sequence[int], strategy: Strategy) -> list[Cut]:
    """The pipelines of a classic allocator over some nodes of the problem."""
    names = {problem.nodes[node] for node in nodes}
    offers = [offer for offer in problem.inputs.offers if offer.id in names]
    allocator = greedy if strategy == "greedy" else dynamic
    chains = allocator(problem.model, offers, problem.inputs.settings)
    return [as_cut(problem, chain) for chain in chains]


def describe_plan(
    problem: Problem, cuts: Sequence[Cut], held: Held = MappingProxyType({})
) -> ClusterPlan:
    """`cuts` in words, with what becomes of all other nodes; `held` is what nodes hold already."""
    used = {problem.nodes[node] for cut in cuts for node in cut.order}
    left = [offer.id for offer in problem.inputs.offers if offer.id not in used]
    shortage = None
    if not cuts:
        reached, _ = farthest_chain(problem.sizes, problem.rooms)
        offers, settings = problem.inputs.offers, problem.inputs.settings
        shortage = explain_shortage(problem.sizes, offers, settings, reached=reached)
    return ClusterPlan(
        pipelines=tuple(_allocation(problem, cut) for cut in cuts),
        estimates=tuple(estimate(problem, cut.order, cut.ends) for cut in cuts),
        spares=stand_by(problem, cuts, left, held),
        objective=value_of(cuts),
        shortage=shortage,
    )


def as_cut(problem: Problem, chain: Chain) -> Cut:
    """A chain of nodes and layers in the problem's indices. Every node must be usable."""
    order = tuple(problem.place_of[node] for node, _, _ in chain)
    ends = tuple(problem.cut_at[end] for _, _, end in chain)
    return Cut(order, ends, score(problem, order, ends))


def _by_region(problem: Problem, groups: list[list[int]]) -> list[Cut]:
    """Pipelines within the groups first, then of what they leave over."""
    cuts = [cut for group in groups for cut in allocate(problem, group, "dp")]
    used = {node for cut in cuts for node in cut.order}
    left = [node for group in groups for node in group if node not in used]
    return cuts + allocate(problem, sorted(left), "dp")


def _recut(improver: Improver, cut: Cut) -> Cut:
    found = improver.solve(cut.order)
    return found if found is not None and found.value > cut.value else cut


def _only_chain(problem: Problem, nodes: Sequence[int]) -> list[Cut]:
    """A tight fit, which the allocators miss because they go by layers of mean size."""
    rooms = {problem.nodes[node]: problem.rooms[problem.nodes[node]] for node in nodes}
    reached, names = farthest_chain(problem.sizes, rooms)
    if reached < problem.model.layers:
        return []
    order = tuple(problem.place_of[name] for name in names)
    [cut] = best_cuts(problem, [[order, *orders(problem, order)]], thorough=True)
    return [] if cut is None else [cut]


def _allocation(problem: Problem, cut: Cut) -> Allocation:
    return Allocation(
        tuple(
            _stage(problem, problem.nodes[node], int(problem.cuts[start]), int(problem.cuts[end]))
            for node, start, end in cut.stages
        )
    )


def _stage(problem: Problem, node: str, start: int, end: int) -> StageAllocation:
    kv_bytes = problem.rooms[node].kv
    per_token = problem.sizes.kv_per_token(start, end)
    return StageAllocation(
        node=node,
        start=start,
        end=end,
        weight_bytes=problem.sizes.weights(start, end),
        kv_bytes=kv_bytes,
        kv_tokens=kv_bytes // per_token if per_token else 0,
    )
