"""Saying what is missing, in figures that a person can act on."""

import math
from collections.abc import Sequence

from pxd.planning.capacity import StageSizes, left_over
from pxd.planning.model import NodeOffer, PlanSettings, Shortage

_GIB = 1 << 30


def explain_shortage(
    sizes: StageSizes, offers: Sequence[NodeOffer], settings: PlanSettings, reached: int
) -> Shortage:
    """Why the best chain of these offers ends at layer `reached` and not at the last."""
    layers = sizes.model.layers
    needed = _memory_for(sizes, settings, 0, layers)
    offered = sum(left_over(offer, settings) for offer in offers)
    remaining = _memory_for(sizes, settings, reached, layers)
    left_layers = layers - reached
    allowed = sum(layers if o.max_layers is None else min(layers, o.max_layers) for o in offers)
    nodes = f"{len(offers)} nodes" if len(offers) > 1 else "node"
    offer = "offer" if len(offers) > 1 else "offers"
    if not offers:
        missing = needed
        reason = f"the model needs {gib(needed)} of memory and no node offers any"
    elif needed > offered:
        missing = needed - offered
        needs, offers_, lacks = _figures(needed, offered, missing)
        reason = (
            f"the model needs {needs} GiB of memory, the {nodes} {offer} {offers_} GiB: "
            f"{lacks} GiB are missing"
        )
    elif allowed < layers:
        missing = remaining
        reason = (
            f"the model has {_count(layers)}, the layer limits of the {nodes} allow {allowed}: "
            f"{_count(left_layers)} ({gib(remaining)}) are left over"
        )
    else:
        missing = remaining
        needs, offers_, lacks = _figures(needed, offered, missing)
        reason = (
            f"the model needs {needs} GiB of memory and the {nodes} {offer} {offers_} GiB, but its "
            f"layers cannot be cut to fit: {_count(left_layers)} ({lacks} GiB) are left over"
        )
    return Shortage(needed, offered, missing, left_layers, reason)


def gib(size: int) -> str:
    """Bytes as GiB with at least two significant digits, however small."""
    return f"{_figures(size)[0]} GiB"


def _figures(*sizes: int) -> list[str]:
    """GiB figures that all show as many decimals as the smallest one needs."""
    smallest = min((size for size in sizes if size), default=_GIB) / _GIB
    exponent = int(f"{smallest:.1e}".partition("e")[2])
    decimals = min(9, max(1, 1 - exponent))
    return [f"{size / _GIB:.{decimals}f}" for size in sizes]


def _count(layers: int) -> str:
    return f"{layers} layer" if layers == 1 else f"{layers} layers"


def _memory_for(sizes: StageSizes, settings: PlanSettings, start: int, end: int) -> int:
    """Offered memory of which the shares would hold these layers."""
    weights = sizes.weights(start, end) / settings.weight_share
    kv = sizes.kv_per_token(start, end) * sizes.min_kv_tokens / settings.kv_share
    return math.ceil(max(weights, kv))
