"""A plan after the cluster changed: as little moves as can, and never a pipeline that is well.

Pipelines that lost a node, and nodes that are free, are planned anew; the others stay as they are,
unless a free node would make one of them so much faster that reloading it pays. Whether a plan
from scratch would be better still is told apart, since it may interrupt everything.
"""

from collections.abc import Sequence

import msgspec

from pxd.planning.auto.cutting import Cut, best_cuts
from pxd.planning.auto.orders import few_orders
from pxd.planning.auto.problem import Problem
from pxd.planning.auto.redundancy import is_near, is_redundant, preferred, value_of
from pxd.planning.model import Chain
from pxd.planning.planner import (
    allocate,
    as_cut,
    describe_plan,
    divide,
    divide_in_several,
)
from pxd.planning.result import Basis, ClusterPlan, PlanInputs, Spare, Strategy
from pxd.planning.spares import Held

INSERT_GAIN = 0.15
REBALANCE_GAIN = 0.25
_TIE = 1e-6

Chains = Sequence[Chain]


class Move(msgspec.Struct, frozen=True):
    """A plan, what it gains over the one before as a share of its objective, and what it costs.

    `gain` is infinite where nothing was served before, and may be below zero where one pipeline
    becomes several. `moved_bytes` of weights are loaded by nodes that do not hold them yet.
    """

    plan: ClusterPlan
    gain: float
    moved_bytes: int


class Replan(msgspec.Struct, frozen=True):
    """`move` is to be made. `rebalance` is a plan from scratch, where that gains a lot more, or has
    several pipelines where `move` has one and is near it in value."""

    move: Move
    rebalance: Move | None


def replan(
    previous: Chains,
    inputs: PlanInputs,
    strategy: Strategy = "auto",
    *,
    spares: Sequence[Spare] = (),
    grow: bool = True,
) -> Replan:
    """Plan anew after a change. `spares` hold ranges ready, which then need not be moved.

    Pipelines of `previous` that all their nodes can still serve are kept exactly, but for at most
    one that a free node makes faster by `INSERT_GAIN` when nothing is broken. Without `grow` not
    even that one is touched, and nothing is looked at from scratch unless something is broken.
    Raises ValueError as `planner.plan_cluster`.
    """
    problem = Problem(inputs)
    held = _held(previous, spares)
    everything = range(len(problem.nodes))
    kept = [as_cut(problem, chain) for chain in previous if is_served(problem, chain)]
    used = {node for cut in kept for node in cut.order}
    free = [node for node in everything if node not in used]
    broken = len(kept) < len(previous)
    if strategy != "auto":
        cuts = kept + allocate(problem, free, strategy)
        return Replan(_move(problem, held, kept, cuts), None)
    fresh = divide(problem, everything) if grow or broken or not previous else kept
    beside = _for_free(problem, previous, held, free, redundant=not kept)
    choices = [kept + cuts for cuts in beside]
    if _contains(fresh, kept):
        choices.insert(0, fresh)
    cuts = _cheapest_of_best(problem, held, choices, broken=broken)
    if grow and not broken:
        cuts = _with_one_more(problem, kept, cuts)
    move = _move(problem, held, kept, cuts)
    return Replan(move, _move(problem, held, cuts, fresh) if _pays(fresh, cuts) else None)


def _pays(fresh: Sequence[Cut], cuts: Sequence[Cut]) -> bool:
    """Whether `cuts` are worth being interrupted for `fresh`.

    The share that a second pipeline may cost is less than what it takes to give it up again.
    """
    if is_redundant(fresh) and not is_redundant(cuts):
        return is_near(fresh, cuts)
    return value_of(fresh) > value_of(cuts) * (1 + REBALANCE_GAIN)


def decide(basis: Basis) -> Move:
    """The plan that follows from `basis`, on every node that computes it."""
    result = replan(basis.previous, basis.inputs, spares=basis.spares, grow=basis.rebalance)
    if basis.rebalance and result.rebalance:
        return result.rebalance
    return (basis.second and _doubled(basis, result.move)) or result.move


def _doubled(basis: Basis, lone: Move) -> Move | None:
    """A plan from scratch with a second pipeline, where that costs little beside the one of `lone`.

    That another plan with one pipeline is much faster yet does not count: it is not to be had.
    """
    problem = Problem(basis.inputs)
    cuts = [as_cut(problem, pipeline.chain) for pipeline in lone.plan.pipelines]
    if len(cuts) != 1:
        return None
    several = divide_in_several(problem, range(len(problem.nodes)))
    if not several or not is_near(several, cuts):
        return None
    return _move(problem, _held(basis.previous, basis.spares), cuts, several)


def objective_of(inputs: PlanInputs, chains: Chains) -> float:
    """The objective of given pipelines. Raises ValueError if these nodes cannot serve them."""
    problem = Problem(inputs)
    for chain in chains:
        if not is_served(problem, chain):
            nodes = ", ".join(node for node, _, _ in chain)
            raise ValueError(f"the nodes {nodes} cannot serve the layers they are given")
    return value_of([as_cut(problem, chain) for chain in chains])


def is_served(problem: Problem, chain: Chain) -> bool:
    """Whether `chain` is a pipeline of this model that fits these nodes as they are now."""
    places, cuts = problem.place_of, problem.cut_at
    names = [node for node, _, _ in chain]
    starts = [start for _, start, _ in chain]
    ends = [end for _, _, end in chain]
    return (
        bool(chain)
        and len(set(names)) == len(names)
        and starts == [0, *ends[:-1]]
        and ends[-1] == problem.model.layers
        and all(
            node in places
            and end in cuts
            and bool(problem.fits[problem.kinds[places[node]], cuts[start], cuts[end]])
            for node, start, end in chain
        )
    )


def moved_bytes(problem: Problem, held: Held, cuts: Sequence[Cut]) -> int:
    """Bytes of weights that nodes must load which they do not hold yet."""
    total = 0
    for cut in cuts:
        for place, start, end in cut.stages:
            first, last = int(problem.cuts[start]), int(problem.cuts[end])
            before, after = held.get(problem.nodes[place], (0, 0))
            total += problem.sizes.weights(first, last)
            low, high = max(first, before), min(last, after)
            if low < high:
                total -= problem.sizes.weights(low, high)
    return total


def _move(problem: Problem, held: Held, before: Sequence[Cut], after: Sequence[Cut]) -> Move:
    old, new = value_of(before), value_of(after)
    gain = new / old - 1 if old else float("inf") if new else 0.0
    return Move(describe_plan(problem, after, held), gain, moved_bytes(problem, held, after))


def _held(previous: Chains, spares: Sequence[Spare]) -> Held:
    held = {spare.node: (spare.start, spare.end) for spare in spares}
    return held | {node: (start, end) for chain in previous for node, start, end in chain}


def _contains(cuts: Sequence[Cut], kept: Sequence[Cut]) -> bool:
    there = {(cut.order, cut.ends) for cut in cuts}
    return all((cut.order, cut.ends) in there for cut in kept)


def _for_free(
    problem: Problem, previous: Chains, held: Held, free: list[int], *, redundant: bool
) -> list[list[Cut]]:
    best = divide(problem, free, redundant=redundant)
    mended = _mended(problem, previous, held, free, redundant=redundant)
    return [best, _renamed(problem, held, best, free), mended]


def _renamed(problem: Problem, held: Held, cuts: Sequence[Cut], free: list[int]) -> list[Cut]:
    """The same cuts, with nodes of one kind where they hold most already."""
    if not problem.links.uniform:
        return list(cuts)
    left = set(free)

    def overlap(node: int, start: int, end: int) -> int:
        before, after = held.get(problem.nodes[node], (0, 0))
        layers = min(after, int(problem.cuts[end])) - max(before, int(problem.cuts[start]))
        return max(0, layers)

    renamed = []
    for cut in cuts:
        order = []
        for old, start, end in cut.stages:
            alike = [node for node in left if problem.kinds[node] == problem.kinds[old]]
            node = min(alike, key=lambda node: (-overlap(node, start, end), node))
            left.remove(node)
            order.append(node)
        renamed.append(Cut(tuple(order), cut.ends, cut.score))
    return renamed


def _mended(
    problem: Problem, previous: Chains, held: Held, free: list[int], *, redundant: bool
) -> list[Cut]:
    """Broken pipelines with spares in the places of lost nodes, as far as there are any."""
    names = {problem.nodes[node] for node in free}
    survivors = {node for chain in previous for node, _, _ in chain}
    spares = [problem.nodes[node] for node in free if problem.nodes[node] not in survivors]
    mended = []
    for chain in previous:
        if is_served(problem, chain) or not any(node in names for node, _, _ in chain):
            continue
        whole = []
        for node, start, end in chain:
            able = [node] if node in names else spares
            fitting = [name for name in able if _fits(problem, name, start, end)]
            if not fitting:
                break
            fitting.sort(key=lambda name: held.get(name) != (start, end))
            whole.append((fitting[0], start, end))
            spares = [name for name in spares if name != fitting[0]]
        if len(whole) == len(chain) and is_served(problem, tuple(whole)):
            mended.append(as_cut(problem, tuple(whole)))
    used = {node for cut in mended for node in cut.order}
    left = [node for node in free if node not in used]
    return mended + divide(problem, left, redundant=redundant and not mended)


def _fits(problem: Problem, name: str, start: int, end: int) -> bool:
    return problem.sizes.fits(problem.rooms[name], start, end)


def _cheapest_of_best(
    problem: Problem, held: Held, choices: Sequence[list[Cut]], *, broken: bool
) -> list[Cut]:
    """What serves at once is taken even if another choice would gain a little."""
    best = preferred(choices)
    at_once = [
        cuts
        for cuts in choices
        if broken
        and value_of(cuts) * (1 + INSERT_GAIN) > value_of(best)
        and not moved_bytes(problem, held, cuts)
    ]
    if at_once:
        return preferred(at_once)
    equal = [
        cuts
        for cuts in choices
        if value_of(cuts) >= value_of(best) * (1 - _TIE)
        and is_redundant(cuts) == is_redundant(best)
    ]
    return min(equal, key=lambda cuts: moved_bytes(problem, held, cuts))


def _with_one_more(problem: Problem, kept: Sequence[Cut], cuts: Sequence[Cut]) -> list[Cut]:
    """The plan with a free node in the pipeline that gains most by it, if any gains enough."""
    used = {node for cut in cuts for node in cut.order}
    free = [node for node in range(len(problem.nodes)) if node not in used]
    alike = {(problem.kinds[node] if problem.links.uniform else node): node for node in free[::-1]}
    best: tuple[float, Cut, Cut] | None = None
    for cut in kept:
        choices = [few_orders(problem, (*cut.order, node)) for node in sorted(alike.values())]
        for grown in best_cuts(problem, choices) if choices else []:
            if grown is None or grown.value < cut.value * (1 + INSERT_GAIN):
                continue
            if best is None or grown.value - cut.value > best[0] * (1 + _TIE):
                best = grown.value - cut.value, cut, grown
    if best is None:
        return list(cuts)
    return [best[2] if cut == best[1] else cut for cut in cuts]
