"""The reference's allocators once more, as plainly as `reference/planning.md` states them.

For models whose ends take no more than a layer each; slow, and for equal layers only.
"""

import math
from collections.abc import Iterator, Sequence
from fractions import Fraction
from functools import cache

from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings

Choice = tuple[float, int | None, tuple[int, ...], int]
"""Stages in all, the open pipeline that a node is given to (None: to nobody, -1: to a new one),
and the residuals and finished pipelines after that."""


class Restated:
    def __init__(
        self, model: ModelCost, offers: Sequence[NodeOffer], settings: PlanSettings
    ) -> None:
        self.model, self.settings = model, settings
        self.layers = model.layers
        self.nodes = sorted(offers, key=lambda offer: (-self.capacity(offer), offer.id))

    def capacity(self, offer: NodeOffer, *, embedding: bool = False, head: bool = False) -> int:
        room = math.floor(offer.memory * self.settings.weight_share)
        room -= self.model.embedding_bytes * embedding
        room -= self.model.head_bytes * (head and not (embedding and self.model.tied))
        return max(0, math.floor(room / self.model.layer_bytes[0]))

    def filled(self, nodes: Sequence[NodeOffer]) -> Chain:
        ends = [(node is nodes[0], node is nodes[-1]) for node in nodes]
        rooms = [
            self.capacity(n, embedding=a, head=b) for n, (a, b) in zip(nodes, ends, strict=True)
        ]
        speeds = [node.tflops for node in nodes]
        low, high = 0.0, max(room / speed for room, speed in zip(rooms, speeds, strict=True))
        for _ in range(40):
            middle = (low + high) / 2
            water = sum(min(r, middle * s) for r, s in zip(rooms, speeds, strict=True))
            low, high = (low, middle) if water >= self.layers else (middle, high)
        targets = [min(r, high * s) for r, s in zip(rooms, speeds, strict=True)]
        counts = [math.floor(target) for target in targets]
        for place in sorted(range(len(nodes)), key=lambda i: (counts[i] - targets[i], i)):
            if sum(counts) < self.layers and counts[place] < rooms[place]:
                counts[place] += 1
        bounds = [sum(counts[:place]) for place in range(len(nodes) + 1)]
        return tuple((n.id, bounds[i], bounds[i + 1]) for i, n in enumerate(nodes))

    def greedy(self) -> list[Chain]:
        left, chains = list(self.nodes), []
        while sum(self.capacity(node) for node in left) >= self.layers:
            members = [left.pop(self._first(left))]
            missing = self.layers - self._taken(members[0], self.layers, first=True)
            while missing > 0 and left:
                members.append(left.pop(0))
                missing -= self._taken(members[-1], missing, first=False)
            if missing > 0:
                break
            chains.append(self.filled(members))
        return chains

    def _first(self, left: Sequence[NodeOffer]) -> int:
        total = sum(self.capacity(node) for node in left)
        alone = [self.capacity(node, embedding=True, head=True) for node in left]
        if total - self.layers < self.layers + 1:
            return 0
        fitting = [i for i, c in enumerate(alone) if c >= self.layers and total - c >= self.layers]
        return max(fitting, default=0)

    def _taken(self, node: NodeOffer, missing: int, *, first: bool) -> int:
        taken = self.capacity(node, embedding=first)
        return taken if taken < missing else self.capacity(node, embedding=first, head=True)

    def dynamic(self) -> list[Chain]:
        most = min(len(self.nodes), sum(map(self.capacity, self.nodes)) // self.layers)
        best, best_value = [], Fraction(0)
        for pipelines in range(1, most + 1):
            groups = self._fewest(pipelines)
            stages = sum(len(group) for group in groups)
            if groups and Fraction(pipelines**2, stages) > best_value:
                best, best_value = groups, Fraction(pipelines**2, stages)
        return [self.filled([self.nodes[index] for index in group]) for group in best]

    def _fewest(self, pipelines: int) -> list[list[int]]:
        """The fewest stages for so many pipelines: every assignment of every node is tried."""

        @cache
        def stages(index: int, residuals: tuple[int, ...], finished: int) -> float:
            if finished == pipelines and not residuals:
                return 0
            if index == len(self.nodes):
                return math.inf
            return min(cost for cost, *_ in choices(index, residuals, finished))

        def choices(index: int, residuals: tuple[int, ...], finished: int) -> Iterator[Choice]:
            node = self.nodes[index]
            yield stages(index + 1, residuals, finished), None, residuals, finished
            for place, residual in enumerate(residuals):
                left = residual - self._taken(node, residual, first=False)
                others = residuals[:place] + residuals[place + 1 :]
                after = tuple(sorted((*others, left))) if left > 0 else others
                yield 1 + stages(index + 1, after, finished + (left <= 0)), place, after, finished
            if finished + len(residuals) < pipelines:
                left = self.layers - self._taken(node, self.layers, first=True)
                after = tuple(sorted((*residuals, left))) if left > 0 else residuals
                yield 1 + stages(index + 1, after, finished + (left <= 0)), -1, after, finished

        if stages(0, (), 0) == math.inf:
            return []
        done: list[list[int]] = []
        opened: list[tuple[int, list[int]]] = []
        for index in range(len(self.nodes)):
            if len(done) == pipelines:
                break
            residuals = tuple(residual for residual, _ in opened)
            _, place, *_ = min(choices(index, residuals, len(done)), key=lambda choice: choice[0])
            if place is None:
                continue
            residual, members = (self.layers, []) if place < 0 else opened.pop(place)
            left = residual - self._taken(self.nodes[index], residual, first=place < 0)
            members.append(index)
            if left > 0:
                opened.append((left, members))
                opened.sort(key=lambda pipeline: pipeline[0])
            else:
                done.append(members)
        return done
