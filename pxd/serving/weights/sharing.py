"""This node's part in passing models on: what it has, what it lends, what it fetches."""

from collections.abc import Callable
from pathlib import Path

from pxd.models.library import Library
from pxd.p2p.network import Network
from pxd.serving.readiness import Members
from pxd.serving.weights.fetch import WeightsFetch
from pxd.serving.weights.source import WeightsSource
from pxd.wire import Buffer, Weights


class Sharing:
    """What has come from others lies below `cache`; for the rest, see `WeightsFetch`. The owner
    hands over the `Weights` frames that arrive."""

    def __init__(
        self,
        network: Network,
        cache: Path,
        members: Callable[[], Members],
        leader: Callable[[], str | None],
        busy: Callable[[], bool],
        came: Callable[[], None],
    ) -> None:
        self._network = network
        self._members = members
        self.library = Library(cache)
        self.fetch = WeightsFetch(network, self.library.store, members, leader, busy, came)
        self.source = WeightsSource(network, self.library, self._announced, busy)

    def _announced(self) -> list[str]:
        own = self._members().get(self._network.peer_id)
        return [held.name for held in own.record.models] if own else []

    @property
    def under_way(self) -> bool:
        return self.source.lending or self.fetch.arrivals.expecting

    def expects(self, peer: str, frame: Weights) -> bool:
        return self.fetch.arrivals.expects(peer, frame)

    def arrived(self, peer: str, frame: Weights, body: Buffer) -> None:
        self.fetch.arrivals.arrived(peer, frame, body)
