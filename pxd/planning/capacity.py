"""From bytes to layers: what a node's memory holds of a model."""

import math
from collections.abc import Iterable
from itertools import accumulate, pairwise

import msgspec

from pxd.planning.model import ModelCost, NodeOffer, PlanSettings


class Budget(msgspec.Struct, frozen=True, order=True):
    """What one node may hold: bytes of stored weights, bytes of KV, number of layers."""

    weights: int
    kv: int
    layers: int


def budget(offer: NodeOffer, model: ModelCost, settings: PlanSettings) -> Budget:
    memory = left_over(offer, settings)
    limit = model.layers if offer.max_layers is None else min(offer.max_layers, model.layers)
    return Budget(
        weights=math.floor(memory * settings.weight_share / offer.expansion),
        kv=math.floor(memory * settings.kv_share),
        layers=limit,
    )


def most_copies(offers: Iterable[NodeOffer], model: ModelCost, settings: PlanSettings) -> int:
    """More often than that these offers together do not hold the model."""
    rooms = [budget(offer, model, settings) for offer in offers]
    size = max(1, model.total_bytes)
    layers = max(1, model.layers)
    return min(
        sum(room.weights for room in rooms) // size, sum(room.layers for room in rooms) // layers
    )


def left_over(offer: NodeOffer, settings: PlanSettings) -> int:
    """The bytes of an offer that other models leave: as much as a node has that offers the rest."""
    share = settings.weight_share + settings.kv_share
    return max(0, offer.memory - math.ceil(offer.taken / share))


def ends_bytes(model: ModelCost, *, embedding: bool, head: bool) -> int:
    """Bytes beside the layers on a node that has these ends of the model."""
    if embedding and head:
        return model.ends_bytes
    return embedding * model.embedding_bytes + head * model.head_bytes


def layer_capacity(weights: int, model: ModelCost, *, embedding: bool, head: bool) -> int:
    """How many layers of the model's mean size fit into `weights` bytes beside these ends."""
    room = weights - ends_bytes(model, embedding=embedding, head=head)
    return max(0, room * model.layers // max(1, sum(model.layer_bytes)))


class StageSizes:
    """Sizes of any range of a model in constant time, and which ranges fit a budget."""

    def __init__(self, model: ModelCost, min_kv_tokens: int) -> None:
        """Raises ValueError when the model's vectors do not belong together."""
        if not model.is_consistent:
            raise ValueError("a model needs one or more layers and each figure for each of them")
        self.model = model
        self.min_kv_tokens = min_kv_tokens
        inner = {cut for cut in model.splits if 0 < cut < model.layers}
        self.cuts: tuple[int, ...] = (0, *sorted(inner), model.layers)
        self._weights = tuple(accumulate(model.layer_bytes, initial=0))
        self._kv = tuple(accumulate(model.kv_bytes_per_token, initial=0))

    def weights(self, start: int, end: int) -> int:
        """Bytes of layers [start, end) and of the model's ends that come with them."""
        layers = self._weights[end] - self._weights[start]
        last = end == self.model.layers
        return layers + ends_bytes(self.model, embedding=start == 0, head=last)

    def kv_per_token(self, start: int, end: int) -> int:
        """Bytes of KV that one position takes in layers [start, end)."""
        return self._kv[end] - self._kv[start]

    def fits(self, room: Budget, start: int, end: int) -> bool:
        return (
            end - start <= room.layers
            and self.weights(start, end) <= room.weights
            and self.kv_per_token(start, end) * self.min_kv_tokens <= room.kv
        )

    def reach(self, room: Budget, position: int) -> int:
        """Index of the farthest cut that a stage from the cut at index `position` can get to."""
        start, low, high = self.cuts[position], position, len(self.cuts) - 1
        if position < high and self.fits(room, start, self.cuts[high]):
            return high
        # The last cut is left out: it alone adds the head, so sizes below it grow steadily.
        high = max(low, high - 1)
        while low < high:
            middle = (low + high + 1) // 2
            if self.fits(room, start, self.cuts[middle]):
                low = middle
            else:
                high = middle - 1
        return low

    def holds_any(self, room: Budget) -> bool:
        """Whether the node could hold at least one piece between neighbouring cuts."""
        return any(self.fits(room, start, end) for start, end in pairwise(self.cuts))
