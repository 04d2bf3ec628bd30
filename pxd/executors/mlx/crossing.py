"""What would cross each cut of a model, found in the graph of its dry run."""

from collections.abc import Sequence
from typing import Protocol

import mlx.core as mx

from pxd.executors.mlx.carry import Path
from pxd.executors.mlx.graph import DependencyGraph


class Call(Protocol):
    """One layer's call in a dry run: the arrays it was given, those it `made` and `returned`, its
    `hidden` state, and `handed_on`, a fresh array that the next layer got in the place of that."""

    layer: int
    arrays: dict[Path, mx.array]
    made: list[mx.array]
    returned: list[mx.array]
    hidden: mx.array
    handed_on: mx.array


class Crossings:
    """`uses` are the distinct arrays that layers were given besides the hidden state; each says
    which layers got it, and where in their calls."""

    def __init__(self, calls: Sequence[Call], tokens: mx.array, logits: mx.array) -> None:
        self._count = len(calls)
        named = {"given_0": tokens, f"made_{self._count}": logits}
        for call in calls:
            named[f"made_{call.layer}"] = call.hidden
            named[f"given_{call.layer + 1}"] = call.handed_on
        hidden = {id(array) for array in named.values()}
        self.uses: list[list[tuple[int, Path]]] = []
        numbers: dict[int, int] = {}
        for call in calls:
            for path, array in call.arrays.items():
                if id(array) in hidden:
                    continue
                if id(array) not in numbers:
                    numbers[id(array)] = len(self.uses)
                    named[f"value_{len(self.uses)}"] = array
                    self.uses.append([])
                self.uses[numbers[id(array)]].append((call.layer, path))
        self._makers = {
            numbers[id(array)]: call.layer
            for call in reversed(calls)
            for array in call.made
            if id(array) in numbers
        }
        self._returned: list[set[int]] = [set() for _ in self.uses]
        for call in calls:
            for array in call.returned:
                if id(array) in numbers:
                    self._returned[numbers[id(array)]].add(call.layer)
        graph = DependencyGraph(named)
        self._sources = {name: graph.sources(name) for name in named}
        self._levels: dict[int, frozenset[int]] = {}

    def is_local(self, value: int) -> bool:
        """Whether it follows from lengths alone, as masks do."""
        return not self._levels_of(value)

    def carried(self, cut: int) -> frozenset[int] | None:
        """The values that cross a cut before layer `cut`; None if something crosses it that no
        later layer is given."""
        found: set[int] = set()
        for layer in range(cut, self._count + 1):
            for source in self._sources[f"made_{layer}"]:
                if not self._is_known(source, layer, cut, found):
                    return None
        return frozenset(found)

    def _is_known(self, source: str, user: int, cut: int, found: set[int]) -> bool:
        """Whether a stage that begins at `cut` can know `source` when `user` needs it."""
        kind, number = source.split("_")
        if kind != "value":
            return int(number) >= cut
        value = int(number)
        levels = self._levels_of(value)
        if not levels or min(levels) >= cut:
            return True
        if max(levels) < cut and self._is_given(value, user, cut):
            found.add(value)
            return True
        # What the model's own code makes between layers, it makes of what only it knows.
        maker = self._makers.get(value, -1)
        return cut <= maker <= user and all(
            self._is_known(inner, maker, cut, found) for inner in self._sources[f"value_{value}"]
        )

    def _is_given(self, value: int, user: int, cut: int) -> bool:
        """Whether the user gets it as an argument, or from a layer that returned what it got."""
        layers = {layer for layer, _ in self.uses[value] if layer >= cut}
        return user in layers or any(layer < user for layer in layers & self._returned[value])

    def _levels_of(self, value: int) -> frozenset[int]:
        """The layers whose input or output a value follows from, 0 for the tokens."""
        if value not in self._levels:
            levels: set[int] = set()
            for source in self._sources[f"value_{value}"]:
                kind, number = source.split("_")
                levels |= self._levels_of(int(number)) if kind == "value" else {int(number)}
            self._levels[value] = frozenset(levels)
        return self._levels[value]
