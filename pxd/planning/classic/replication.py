"""Which layers have how much KV memory behind them, and where one more node helps most.

Joining, leaving and when to rebalance are those of the layer allocator of Parallax v0.1.2
(`reference/planning.md`). A node counts for each of its layers with its KV share divided by their
number, in whole bytes, so that what a join adds a leave takes away exactly.
"""

import math
from collections.abc import Sequence

from pxd.planning.capacity import StageSizes, budget
from pxd.planning.classic.canonical import Canonical
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings
from pxd.planning.routing.chains import count_chains
from pxd.planning.routing.cost import Hosted

Range = tuple[int, int]
Placed = tuple[str, int, int]
"""A node and its layers [start, end)."""


class LayerLoads:
    """KV memory hosted per layer, in bytes: `loads` has one entry for each layer."""

    def __init__(self, model: ModelCost, settings: PlanSettings) -> None:
        self._model, self._settings = model, settings
        self._sizes = StageSizes(model, settings.min_kv_tokens)
        self._hosted: dict[str, tuple[int, int, int]] = {}
        self.loads = [0] * model.layers

    @property
    def ranges(self) -> dict[str, Range]:
        """The layers [start, end) of every node."""
        return {node: (start, end) for node, (start, end, _) in self._hosted.items()}

    @property
    def lightest_layer(self) -> int:
        """The one with the least KV memory; of equals the first."""
        return self.loads.index(min(self.loads))

    @property
    def covered(self) -> bool:
        """Whether some nodes' ranges follow one upon the other through the whole model."""
        hosted = [Hosted(node, start, end) for node, (start, end) in self.ranges.items()]
        return count_chains(hosted, self._model.layers) > 0

    @property
    def variation(self) -> float:
        """Coefficient of variation of the loads: standard deviation over mean; 0 without load."""
        mean = sum(self.loads) / len(self.loads)
        if not mean:
            return 0.0
        return math.sqrt(sum((load - mean) ** 2 for load in self.loads) / len(self.loads)) / mean

    def needs_rebalance(self, threshold: float = 0.25) -> bool:
        return not self.covered or self.variation > threshold

    def host(self, offer: NodeOffer, start: int, end: int) -> None:
        """Count a node that holds layers [start, end).

        Raises ValueError for a node that is counted already and for an impossible range.
        """
        if offer.id in self._hosted:
            raise ValueError(f"node {offer.id} holds layers already")
        if not 0 <= start < end <= self._model.layers:
            raise ValueError(f"the model has no layers [{start}, {end})")
        share = budget(offer, self._model, self._settings).kv // (end - start)
        self._hosted[offer.id] = (start, end, share)
        self._add(start, end, share)

    def join(self, offer: NodeOffer) -> Placed | None:
        """Give a new node the lightest layer and as many after it as it can hold.

        Where it cannot hold the lightest at all it begins at the next lightest. None if there is
        nothing that it could hold. Raises ValueError for a node that is counted already.
        """
        room = budget(offer, self._model, self._settings)
        cuts = self._sizes.cuts
        for place in sorted(range(len(cuts) - 1), key=self._lightest_in):
            end = cuts[self._sizes.reach(room, place)]
            if end > cuts[place]:
                self.host(offer, cuts[place], end)
                return offer.id, cuts[place], end
        return None

    def leave(self, node: str) -> None:
        """Take a node away. Raises ValueError if it holds nothing."""
        if node not in self._hosted:
            raise ValueError(f"node {node} holds no layers")
        start, end, share = self._hosted.pop(node)
        self._add(start, end, -share)

    def _lightest_in(self, place: int) -> tuple[int, int]:
        """The load of the lightest layer between two cuts, and where it begins."""
        start, end = self._sizes.cuts[place : place + 2]
        return min(self.loads[start:end]), start

    def _add(self, start: int, end: int, share: int) -> None:
        for layer in range(start, end):
            self.loads[layer] += share


def place_left_over(
    model: ModelCost, offers: Sequence[NodeOffer], chains: Sequence[Chain], settings: PlanSettings
) -> tuple[Placed, ...]:
    """Ranges for the offers that are in no chain, joining one after the other, largest first.

    Nodes that can hold nothing are left out. Raises ValueError for two offers of one node and for
    a chain with a node that is not offered.
    """
    by_id = {offer.id: offer for offer in offers}
    canonical = Canonical(model, offers, settings).nodes
    too_small = sorted(by_id.keys() - set(canonical))
    loads = LayerLoads(model, settings)
    for node, start, end in (stage for chain in chains for stage in chain):
        if node not in by_id:
            raise ValueError(f"there is no offer of node {node}")
        loads.host(by_id[node], start, end)
    used = loads.ranges
    left = [by_id[node] for node in (*canonical, *too_small) if node not in used]
    placed = [loads.join(offer) for offer in left]
    return tuple(stage for stage in placed if stage is not None)
