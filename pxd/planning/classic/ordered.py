"""One pipeline over given nodes in a given order."""

from collections.abc import Sequence

from pxd.planning.auto.problem import known_speeds
from pxd.planning.capacity import StageSizes, budget
from pxd.planning.classic.chain import cut_chain
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings


def in_order(model: ModelCost, offers: Sequence[NodeOffer], settings: PlanSettings) -> Chain | None:
    """Layers of `model` for exactly these nodes in this order, water-filled by compute.

    The first node also holds the embedding, the last the head; each holds at least one layer. A
    node whose compute is not known counts as the mean of the others. None if no cut of the model
    fits. Raises ValueError for two offers of one node.
    """
    if len({offer.id for offer in offers}) != len(offers):
        raise ValueError("two offers of the same node")
    if not offers:
        return None
    ranges = cut_chain(
        StageSizes(model, settings.min_kv_tokens),
        [budget(offer, model, settings) for offer in offers],
        [tflops for tflops, _ in known_speeds(offers)],
    )
    if ranges is None:
        return None
    return tuple((offer.id, *span) for offer, span in zip(offers, ranges, strict=True))
