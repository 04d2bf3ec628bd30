"""The plan of one model: a single pipeline over every node that can take part in it."""

from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property

from pxd.planning.capacity import Budget, StageSizes, budget
from pxd.planning.chain import Ranges, cut_chain
from pxd.planning.model import (
    Allocation,
    ModelCost,
    NodeOffer,
    PlanSettings,
    Shortage,
    StageAllocation,
)
from pxd.planning.search import farthest_chain
from pxd.planning.shortage import explain_shortage

Chain = tuple[tuple[str, int, int], ...]

_MAX_INSERTIONS = 256


def plan_pipeline(
    model: ModelCost,
    offers: Sequence[NodeOffer],
    settings: PlanSettings,
    previous: Chain = (),
) -> Allocation | Shortage:
    """Split `model` over all nodes that can hold at least one layer of it, or say what is missing.

    Ranges are proportional to compute as far as exact sizes and allowed cuts permit. The result
    does not depend on the order of `offers`. There are never more stages than pieces the model can
    be cut into; nodes with the most memory are then preferred. `previous` is kept as it is while
    it fits and no plan with more stages is possible. A `Shortage` is exact as far as
    `search.farthest_chain` is. Raises ValueError for two offers of one node.
    """
    planner = _Planner(model, offers, settings)
    stages = planner.best()
    if planner.keeps(previous) and (stages is None or len(stages) <= len(previous)):
        stages = previous
    if stages is None:
        return explain_shortage(planner.sizes, offers, settings, reached=planner.farthest[0])
    return Allocation(tuple(planner.describe(*stage) for stage in stages))


class _Planner:
    """The inputs of one plan, in canonical order: most memory first, then by id."""

    def __init__(
        self, model: ModelCost, offers: Sequence[NodeOffer], settings: PlanSettings
    ) -> None:
        by_id = {offer.id: offer for offer in offers}
        if len(by_id) != len(offers):
            raise ValueError("two offers of the same node")
        self.sizes = StageSizes(model, settings.min_kv_tokens)
        rooms = {node: budget(offer, model, settings) for node, offer in by_id.items()}
        usable = [node for node in rooms if self.sizes.holds_any(rooms[node])]
        usable.sort(key=lambda node: (-rooms[node].weights, -rooms[node].layers, node))
        self.rooms: Mapping[str, Budget] = {node: rooms[node] for node in usable}
        self.speeds = _speeds({node: by_id[node].tflops for node in usable})

    def keeps(self, chain: Chain) -> bool:
        """Whether `chain` is a pipeline of this model that fits these nodes as they are now."""
        nodes = [node for node, _, _ in chain]
        starts = [start for _, start, _ in chain]
        ends = [end for _, _, end in chain]
        cuts = set(self.sizes.cuts)
        return (
            bool(chain)
            and len(set(nodes)) == len(nodes)
            and starts == [0, *ends[:-1]]
            and ends[-1] == self.sizes.model.layers
            and cuts.issuperset(ends)
            and all(
                node in self.rooms and start < end and self.sizes.fits(self.rooms[node], start, end)
                for node, start, end in chain
            )
        )

    def best(self) -> Chain | None:
        candidates = list(self.rooms)[: len(self.sizes.cuts) - 1]
        return self.cut(candidates) or self.searched()

    def searched(self) -> Chain | None:
        """For tight cases: the farthest chain, then any further node that still finds a place."""
        reached, order = self.farthest
        chain = self.cut(order) if reached == self.sizes.model.layers else None
        attempts = 0
        for node in self.rooms:
            if chain is None or node in order or len(order) == len(self.sizes.cuts) - 1:
                continue
            for longer in _insertions(order, node):
                attempts += 1
                if attempts > _MAX_INSERTIONS:
                    return chain
                if (grown := self.cut(longer)) is not None:
                    chain, order = grown, longer
                    break
        return chain

    @cached_property
    def farthest(self) -> tuple[int, list[str]]:
        """The farthest layer a chain can reach, and that chain."""
        return farthest_chain(self.sizes, self.rooms)

    def cut(self, order: Sequence[str]) -> Chain | None:
        if not order:
            return None
        ranges: Ranges | None = cut_chain(
            self.sizes, [self.rooms[node] for node in order], [self.speeds[node] for node in order]
        )
        if ranges is None:
            return None
        return tuple((node, *span) for node, span in zip(order, ranges, strict=True))

    def describe(self, node: str, start: int, end: int) -> StageAllocation:
        kv_bytes = self.rooms[node].kv
        per_token = self.sizes.kv_per_token(start, end)
        return StageAllocation(
            node=node,
            start=start,
            end=end,
            weight_bytes=self.sizes.weights(start, end),
            kv_bytes=kv_bytes,
            kv_tokens=kv_bytes // per_token if per_token else 0,
        )


def _insertions(order: list[str], node: str) -> Iterator[list[str]]:
    # The middle first: a node that was left out is mostly one too small for an end of the model.
    places = sorted(range(len(order) + 1), key=lambda place: (place in (0, len(order)), place))
    return ([*order[:place], node, *order[place:]] for place in places)


def _speeds(tflops: dict[str, float]) -> dict[str, float]:
    """Compute of every node; those not measured count as the mean of the others."""
    measured = [figure for figure in tflops.values() if figure > 0]
    mean = sum(measured) / len(measured) if measured else 1.0
    return {node: figure if figure > 0 else mean for node, figure in tflops.items()}
