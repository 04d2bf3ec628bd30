"""The pipelines of one plan epoch, and whose turn it is."""

from collections.abc import Iterable
from typing import Generic, TypeVar

import msgspec

from pxd.planning.routing.cost import Loads
from pxd.planning.routing.shortest import NO_PATH, Path

Epoch = TypeVar("Epoch")


class StaleEpoch(Exception):
    """A pipeline was asked for under another plan than the one it belongs to."""


class PipelineRoom(msgspec.Struct, frozen=True):
    """Requests that a pipeline takes at most, and how many more it can take now."""

    capacity: int
    free: int


class EpochPipelines(Generic[Epoch]):
    """Hands out the pipelines of one epoch in turn.

    A pipeline belongs to the plan that it was made in and lives no longer: a new plan gets a new
    object, and whoever still asks under another epoch is refused instead of being sent to nodes
    that may be gone. Raises ValueError if two pipelines share a node.
    """

    def __init__(self, epoch: Epoch, pipelines: Iterable[Path]) -> None:
        self.epoch = epoch
        self._pipelines = list(pipelines)
        self._turn = 0
        nodes = [node for path in self._pipelines for node in path.nodes]
        if len(set(nodes)) != len(nodes):
            raise ValueError("two pipelines of one plan share a node")

    @property
    def pipelines(self) -> tuple[Path, ...]:
        return tuple(self._pipelines)

    def next(self, epoch: Epoch, loads: Loads) -> Path:
        """The next pipeline in turn all of whose nodes are alive and can take a request.

        `NO_PATH` if there is none. A node without a load is dead. Raises StaleEpoch.
        """
        if epoch != self.epoch:
            raise StaleEpoch(f"these pipelines are of epoch {self.epoch}, not of {epoch}")
        count = len(self._pipelines)
        for place in range(self._turn, self._turn + count):
            path = self._pipelines[place % count]
            if _room(path, loads).free:
                self._turn = (place + 1) % count
                return path
        return NO_PATH

    def remove(self, node: str) -> tuple[str, ...]:
        """Take the pipeline of a node that has left apart; its other nodes are free again."""
        for place, path in enumerate(self._pipelines):
            if node in path.nodes:
                del self._pipelines[place]
                self._turn -= place < self._turn
                return tuple(other for other in path.nodes if other != node)
        return ()

    def rooms(self, loads: Loads) -> tuple[PipelineRoom, ...]:
        """Of each pipeline, as its narrowest node has it; a dead node leaves none free."""
        return tuple(_room(path, loads) for path in self._pipelines)


def _room(path: Path, loads: Loads) -> PipelineRoom:
    return PipelineRoom(
        capacity=min((loads[node].max_requests for node in path.nodes if node in loads), default=0),
        free=min(loads[node].free if node in loads else 0 for node in path.nodes),
    )
