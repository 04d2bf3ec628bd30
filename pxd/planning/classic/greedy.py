"""The greedy allocator of Parallax v0.1.2 (`reference/planning.md`): largest nodes first.

With three differences: the node that a pipeline starts and ends with pays for both ends; a node
that has no room for the head still counts in full as a stage before the last; a pipeline is cut
by exact sizes, and gets one more node where these do not bear the estimate out.
"""

from collections.abc import Sequence

from pxd.planning.classic.canonical import Canonical
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings


def greedy(
    model: ModelCost, offers: Sequence[NodeOffer], settings: PlanSettings
) -> tuple[Chain, ...]:
    """Node-disjoint pipelines, as few stages as possible in each as it is built.

    The order of `offers` does not matter. Raises ValueError for two offers of one node.
    """
    inputs = Canonical(model, offers, settings)
    left = list(range(len(inputs.nodes)))
    chains: list[Chain] = []
    while (built := _next_pipeline(inputs, left)) is not None:
        members, chain = built
        chains.append(chain)
        left = [node for node in left if node not in members]
    return tuple(chains)


def _next_pipeline(inputs: Canonical, left: Sequence[int]) -> tuple[set[int], Chain] | None:
    if sum(inputs.capacities[node].plain for node in left) < inputs.pieces:
        return None
    alone = _alone(inputs, left)
    if alone is not None and (chain := inputs.cut([alone])) is not None:
        return {alone}, chain
    members: list[int] = []
    missing = inputs.pieces
    for node in left:
        size = inputs.capacities[node]
        closes = (size.head if members else size.both) >= missing
        if closes and (chain := inputs.cut([*members, node])) is not None:
            return {*members, node}, chain
        # One piece always stays for the node that will hold the head.
        still_missing = max(1, missing - (size.plain if members else size.embedding))
        if closes or still_missing < missing:
            members.append(node)
            missing = still_missing
        if len(members) == inputs.pieces:
            break
    return None


def _alone(inputs: Canonical, left: Sequence[int]) -> int | None:
    """The smallest node that holds the whole model and leaves enough for one more pipeline."""
    pieces, sizes = inputs.pieces, inputs.capacities
    total = sum(sizes[node].plain for node in left)
    if total - pieces < pieces + 1:
        return None
    fitting = [n for n in left if sizes[n].both >= pieces and total - sizes[n].both >= pieces]
    return fitting[-1] if fitting else None
