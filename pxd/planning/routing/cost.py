"""What a way through hosted layers costs: the reference's sum, and pxd's own."""

import math
from collections.abc import Mapping
from typing import Protocol

import msgspec

from pxd.planning.links import Links

REFERENCE_LOAD_S = 0.00005
"""What Parallax v0.1.2 adds to a measured latency for each request that a node already has."""


class Hosted(msgspec.Struct, frozen=True):
    """A node that holds layers [start, end), and how long one decode step takes it, in seconds.

    `layer_s` is the roofline of one layer and `ends_s` that of the embedding and the projection
    where it has them; `measured_s` is what a layer was measured to take with the ends spread over
    all layers, 0 if it was not. Raises ValueError for seconds that are negative or not a number.
    """

    node: str
    start: int
    end: int
    layer_s: float = 0.0
    ends_s: float = 0.0
    measured_s: float = 0.0

    def __post_init__(self) -> None:
        if not (self.layer_s >= 0 and self.ends_s >= 0 and self.measured_s >= 0):
            raise ValueError(f"node {self.node!r} has a negative latency or one that is no number")

    @property
    def layers(self) -> int:
        return self.end - self.start


class NodeLoad(msgspec.Struct, frozen=True):
    """What a node has to do at the moment, and how many requests it takes at most."""

    requests: int
    max_requests: int
    alive: bool = True

    @property
    def free(self) -> int:
        """Requests that it can still take."""
        return max(0, self.max_requests - self.requests) if self.alive else 0


IDLE = NodeLoad(requests=0, max_requests=1)

Loads = Mapping[str, NodeLoad]
"""By node id."""


class RouteCost(Protocol):
    """Seconds, never negative; infinite where there is no way."""

    def stage(self, host: Hosted) -> float:
        """Of one decode step on its layers."""

    def hop(self, sender: Hosted, receiver: Hosted) -> float:
        """Of the way from one stage to the next."""

    def home(self, tail: Hosted, head: Hosted) -> float:
        """Of the token's way back from the last stage to the first, who may be the same node."""


class ReferenceCost:
    """The sum that Parallax v0.1.2 makes, faults included: what the public vectors pin.

    A node's mean time per layer counts once whatever the number of its layers, a hop costs its
    round trip, the way home nothing. `rtts` are seconds by (sender, receiver): one that is missing
    counts in reverse, and is infinite if that is missing too. Nodes without a load are idle.
    """

    def __init__(self, rtts: Mapping[tuple[str, str], float], loads: Loads | None = None) -> None:
        self._rtts = rtts
        self._loads = loads or {}

    def stage(self, host: Hosted) -> float:
        load = self._loads.get(host.node, IDLE)
        if not load.free:
            return math.inf
        if host.measured_s:
            return host.measured_s + REFERENCE_LOAD_S * load.requests
        return host.layer_s + host.ends_s / host.layers

    def hop(self, sender: Hosted, receiver: Hosted) -> float:
        there, back = (sender.node, receiver.node), (receiver.node, sender.node)
        return self._rtts.get(there, self._rtts.get(back, math.inf))

    def home(self, tail: Hosted, head: Hosted) -> float:  # noqa: ARG002
        return 0.0


class DecodeCost:
    """Seconds from a token to the next for one request: pxd's own.

    Every layer counts, with the ends; every hop carries one position's `position_bytes` over its
    link, and the token goes home from the tail to the head. Nodes without a load are idle.
    """

    def __init__(self, links: Links, position_bytes: float, loads: Loads | None = None) -> None:
        self._links = links
        self._position_bytes = position_bytes
        self._loads = loads or {}

    def stage(self, host: Hosted) -> float:
        if not self._loads.get(host.node, IDLE).free:
            return math.inf
        if host.measured_s:
            return host.layers * host.measured_s
        return host.layers * host.layer_s + host.ends_s

    def hop(self, sender: Hosted, receiver: Hosted) -> float:
        return self._links.transfer(sender.node, receiver.node, self._position_bytes)

    def home(self, tail: Hosted, head: Hosted) -> float:
        return self._links.transfer(tail.node, head.node, 0)
