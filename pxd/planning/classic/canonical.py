"""The inputs of the classic allocators in canonical order, with capacities as whole numbers.

Capacities count pieces: what lies between neighbouring cuts, so a layer where a model may be cut
anywhere. They are exact for equal pieces. For unequal ones there are two estimates: by the mean
piece, which may promise too much, and by the largest, which never does.
"""

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Literal

import msgspec

from pxd.planning.auto.problem import known_speeds
from pxd.planning.capacity import Budget, StageSizes, budget, ends_bytes
from pxd.planning.classic.chain import cut_chain
from pxd.planning.classic.clamping import clamp, reaches_end
from pxd.planning.classic.waterfill import water_fill
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings

Estimate = Literal["mean", "cautious"]


class Capacity(msgspec.Struct, frozen=True):
    """Pieces that a node holds alone, beside the embedding, beside the head, beside both.

    They may be more than the model has: the larger node comes first even if both hold all of it.
    """

    plain: int
    embedding: int
    head: int
    both: int


class Canonical:
    """Nodes that can hold anything, by capacity descending, then by id.

    `nodes` and `capacities` go together. Raises ValueError for two offers of one node.
    """

    def __init__(
        self,
        model: ModelCost,
        offers: Sequence[NodeOffer],
        settings: PlanSettings,
        estimate: Estimate = "mean",
    ) -> None:
        if len({offer.id for offer in offers}) != len(offers):
            raise ValueError("two offers of the same node")
        self.sizes = StageSizes(model, settings.min_kv_tokens)
        self.pieces = len(self.sizes.cuts) - 1
        unit = _unit(self.sizes, estimate)
        self.rooms = {offer.id: budget(offer, model, settings) for offer in offers}
        found = {
            node: _capacity(room, model, self.pieces, unit) for node, room in self.rooms.items()
        }
        usable = [offer for offer in offers if found[offer.id].plain > 0]
        usable.sort(key=lambda offer: (-found[offer.id].plain, offer.id))
        self.nodes = tuple(offer.id for offer in usable)
        self.capacities = tuple(found[node] for node in self.nodes)
        speeds = known_speeds(usable)
        self._tflops = {node: tflops for node, (tflops, _) in zip(self.nodes, speeds, strict=True)}

    def cut(self, members: Sequence[int]) -> Chain | None:
        """The nodes with these indices as one pipeline in this order, water-filled by compute.

        None if no cut of the model fits them, each with at least one layer.
        """
        order = [self.nodes[index] for index in members]
        rooms = [self.rooms[node] for node in order]
        if not reaches_end(self.sizes, rooms):
            return None
        speeds = [self._tflops[node] for node in order]
        ranges = clamp(self.sizes, rooms, self._targets(members, speeds))
        if ranges is None:
            ranges = cut_chain(self.sizes, rooms, speeds)
        if ranges is None:
            return None
        return tuple((node, *span) for node, span in zip(order, ranges, strict=True))

    def _targets(self, members: Sequence[int], speeds: Sequence[float]) -> list[int]:
        """Where the stages would end if all pieces were equal, as indices of cuts."""
        sizes = [self.capacities[node] for node in members]
        capacities = [size.plain for size in sizes]
        capacities[0], capacities[-1] = sizes[0].embedding, sizes[-1].head
        if len(sizes) == 1:
            capacities = [sizes[0].both]
        capacities = [min(capacity, self.pieces) for capacity in capacities]
        counts = water_fill(capacities, speeds, self.pieces)
        if counts is None or 0 in counts:
            # Somebody would get nothing, or unequal pieces fit although the estimate says no.
            at_least_one = [max(1, capacity) for capacity in capacities]
            counts = water_fill(at_least_one, speeds, self.pieces, minimum=1)
        return list(accumulate(counts or capacities))


class _Unit(msgspec.Struct, frozen=True):
    """All pieces together at the size they are counted with; `kv` at the minimum of tokens."""

    weights: int
    kv: int
    layers: int


def _unit(sizes: StageSizes, estimate: Estimate) -> _Unit:
    model, tokens = sizes.model, sizes.min_kv_tokens
    if estimate == "mean":
        kv = sizes.kv_per_token(0, model.layers) * tokens
        return _Unit(max(1, sum(model.layer_bytes)), kv, model.layers)
    pieces = list(pairwise(sizes.cuts))
    return _Unit(
        weights=len(pieces) * max(1, *(sum(model.layer_bytes[a:b]) for a, b in pieces)),
        kv=len(pieces) * max(sizes.kv_per_token(a, b) for a, b in pieces) * tokens,
        layers=len(pieces) * max(b - a for a, b in pieces),
    )


def _capacity(room: Budget, model: ModelCost, pieces: int, unit: _Unit) -> Capacity:
    limits = [room.kv * pieces // unit.kv] if unit.kv else []
    if room.layers < model.layers:
        limits.append(room.layers * pieces // unit.layers)

    def beside(*, embedding: bool, head: bool) -> int:
        left = room.weights - ends_bytes(model, embedding=embedding, head=head)
        return max(0, min([left * pieces // unit.weights, *limits]))

    return Capacity(
        plain=beside(embedding=False, head=False),
        embedding=beside(embedding=True, head=False),
        head=beside(embedding=False, head=True),
        both=beside(embedding=True, head=True),
    )
