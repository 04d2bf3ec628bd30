"""What lies between nodes: round-trip times and bandwidths."""

from collections.abc import Iterable, Mapping

import msgspec

from pxd.planning.model import NodeId, Seconds, Speed

DEFAULT_RTT_S = 0.001
DEFAULT_BANDWIDTH = 0.117
"""GB/s: what gigabit Ethernet leaves over for payload."""


HOP_S = 0.0004
"""What framing, encryption and waking up cost at every hop, whatever the network."""


class Link(msgspec.Struct, frozen=True, array_like=True, order=True):
    """From node `a` to node `b`: `rtt` in seconds, `bandwidth` in GB/s; 0 means not measured."""

    a: NodeId
    b: NodeId
    rtt: Seconds = 0.0
    bandwidth: Speed = 0.0


class Links:
    """Looks links up. One measured in one direction only counts for both.

    A pair that nobody has measured is taken to be as slow as the slowest that somebody has, and no
    better than gigabit Ethernet.
    """

    def __init__(self, links: Iterable[Link] = ()) -> None:
        self._rtt: dict[tuple[str, str], float] = {}
        self._bandwidth: dict[tuple[str, str], float] = {}
        for link in sorted(links):
            if link.rtt > 0:
                self._rtt[link.a, link.b] = link.rtt
            if link.bandwidth > 0:
                self._bandwidth[link.a, link.b] = link.bandwidth
        self._far = max([DEFAULT_RTT_S, *self._rtt.values()])
        self._narrow = min([DEFAULT_BANDWIDTH, *self._bandwidth.values()])

    @property
    def uniform(self) -> bool:
        """Whether nothing has been measured, so that all pairs are alike."""
        return not self._rtt and not self._bandwidth

    def rtt(self, a: str, b: str) -> float:
        """Seconds between two nodes, there and back."""
        return _either(self._rtt, a, b, self._far)

    def bandwidth(self, a: str, b: str) -> float:
        """GB/s between two nodes."""
        return _either(self._bandwidth, a, b, self._narrow)

    def transfer(self, a: str, b: str, size: float) -> float:
        """Seconds until `size` bytes sent by `a` have arrived at `b`."""
        if a == b:
            return 0.0
        return HOP_S + self.rtt(a, b) / 2 + size / (self.bandwidth(a, b) * 1e9)


def _either(table: Mapping[tuple[str, str], float], a: str, b: str, missing: float) -> float:
    return table.get((a, b)) or table.get((b, a)) or missing
