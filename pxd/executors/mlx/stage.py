"""Runs layers [start, end) of an mlx-lm model by the model's own code.

The model's `__call__` stays in charge of masks, scales and layer order. Layers of other stages are
replaced, each at its own index, by stand-ins that do nothing. The one before `start` brings the
incoming hidden state in; the last own layer is tapped for the outgoing one. What the model computes
around that (embedding of dummy tokens, norm, head) is never evaluated and so costs nothing.
"""

from collections.abc import Mapping
from typing import Any, Protocol

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from pxd.executors.mlx.carry import Path, at, columns, pack, put, unpack
from pxd.executors.mlx.layers import Standin, find_layers
from pxd.executors.mlx.split import SplitPlan

Caches = list[Any]


class Stage(Protocol):
    """A loaded part of a model."""

    model: nn.Module
    first: bool
    last: bool
    layers: int
    hidden_size: int
    vocabulary: int

    def width(self, dtype: mx.Dtype, *, incoming: bool) -> int:
        """Columns of the hidden states that come in or go out, with what they carry."""

    def make_caches(self) -> Caches:
        """Caches for one request; batches are made of these by mlx-lm's merge and extend."""

    def forward(self, inputs: mx.array, caches: Caches) -> mx.array:
        """Build the graph for token ids ``(batch, n)`` or hidden states ``(batch, n, hidden)``.

        Returns hidden states, or logits ``(batch, n, vocabulary)`` on the last stage, unevaluated.
        """


def vocabulary_of(model: nn.Module) -> int:
    """How many logits a model computes for each position; nothing is evaluated."""
    logits = model(mx.zeros((1, 1), mx.int32), cache=make_prompt_cache(model))
    return int(logits.shape[-1])


class WholeModel:
    """The stage that is the whole model; works for every mlx-lm architecture."""

    first = last = True

    def __init__(self, model: nn.Module, layers: int, hidden_size: int, vocabulary: int) -> None:
        self.model = model
        self.layers, self.hidden_size, self.vocabulary = layers, hidden_size, vocabulary

    def width(self, dtype: mx.Dtype, *, incoming: bool) -> int:
        del dtype, incoming
        return self.hidden_size

    def make_caches(self) -> Caches:
        return make_prompt_cache(self.model)

    def forward(self, inputs: mx.array, caches: Caches) -> mx.array:
        return self.model(inputs, cache=caches)


class _Boundary:
    """What is on its way into and out of the own layers, during one forward pass: the hidden state
    and, by their place among what is carried, values that go with it."""

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        self.incoming: mx.array | None = None
        self.outgoing: mx.array | None = None
        self.brought: list[mx.array] = []
        self.taken: dict[int, mx.array] = {}


Uses = Mapping[Path, int]
"""Where a layer is given carried values: the place of each among what its stage gets or sends."""


class _Absent(Standin):
    """A layer of another stage: hands its input on, or brings the hidden state in.

    Takes the values at `uses` for the stages that follow.
    """

    def __init__(
        self, layer: nn.Module, boundary: _Boundary, plan: SplitPlan, uses: Uses, *, brings: bool
    ) -> None:
        super().__init__(layer)
        extras = None if plan.tuples is None else (None,) * (plan.tuples - 1)
        self.hide("role", (boundary, plan.hidden_at, extras, uses, brings))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        boundary, hidden_at, extras, uses, brings = self.role
        for path, place in uses.items():
            boundary.taken[place] = at(path, args, kwargs)
        hidden = boundary.incoming if brings else at((hidden_at,), args, kwargs)
        return hidden if extras is None else (hidden, *extras)


class _Fed(Standin):
    """An own layer that is given carried values in place of what the model has for it."""

    def __init__(
        self, layer: nn.Module, boundary: _Boundary, uses: Uses, templates: Mapping[Any, Any]
    ) -> None:
        super().__init__(layer)
        self.hide("role", (boundary, uses, templates))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        boundary, uses, templates = self.role
        values = {path: boundary.brought[place] for path, place in uses.items()}
        given, named = put(values, templates, args, kwargs)
        return self.layer(*given, **named)


class _Tapped(Standin):
    """The last own layer: keeps what it returns as the outgoing hidden state."""

    def __init__(self, layer: nn.Module, boundary: _Boundary) -> None:
        super().__init__(layer)
        self.hide("boundary", boundary)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        output = self.layer(*args, **kwargs)
        self.boundary.outgoing = output if isinstance(output, mx.array) else output[0]
        return output


class PartialModel:
    """A stage that is not the whole model. Made before loading; `tap` is called after it.

    A request's caches are those of the own layers, then *shadows*: one for each kind of attention
    cache that only other stages own. The model makes masks from some cache of each kind, and a
    shadow keeps the right length while holding one number per position.
    """

    def __init__(self, model: nn.Module, plan: SplitPlan, start: int, end: int) -> None:
        self.model = model
        found = find_layers(model)
        self.first, self.last = start == 0, end == plan.layers
        self.layers, self.hidden_size = end - start, plan.hidden_size
        self.vocabulary = plan.vocabulary
        self.layer_prefix = found.prefix
        self.own_layers = found.layers[start:end]
        self._found, self._plan, self._start, self._end = found, plan, start, end
        self._boundary = _Boundary()
        self._brings, self._sends = plan.carried.get(start, ()), plan.carried.get(end, ())
        self._choose_caches(start, end)
        found.replace(
            [
                layer if start <= i < end else self._absent(layer, i)
                for i, layer in enumerate(found.layers)
            ]
        )

    def _absent(self, layer: nn.Module, number: int) -> _Absent:
        # Once is enough, and later layers may not be given what this one did not return.
        sent = {
            one.uses_from(self._end)[0][1]: place
            for place, one in enumerate(self._sends)
            if one not in self._brings and one.uses_from(self._end)[0][0] == number
        }
        brings = number == self._start - 1
        return _Absent(layer, self._boundary, self._plan, sent, brings=brings)

    def tap(self) -> None:
        """Take the outgoing hidden state, and feed what is carried, from now on. Layers that this
        concerns leave the parameter tree."""
        layers = self._found.layers
        for number in range(self._start, self._end):
            uses = {
                path: place
                for place, one in enumerate(self._brings)
                for layer, path in one.uses
                if layer == number
            }
            if uses:
                templates = self._plan.templates[number]
                layers[number] = _Fed(layers[number], self._boundary, uses, templates)
        if not self.last:
            layers[self._end - 1] = _Tapped(layers[self._end - 1], self._boundary)

    def width(self, dtype: mx.Dtype, *, incoming: bool) -> int:
        return self.hidden_size + columns(self._brings if incoming else self._sends, dtype)

    def _choose_caches(self, start: int, end: int) -> None:
        plan = self._plan
        own = {plan.cache_of[i] for i in range(start, end) if i in plan.cache_of}
        if self.first:  # caches that no layer uses belong to the embedding
            own |= set(range(len(plan.kinds))) - set(plan.cache_of.values())
        self._own = sorted(own)
        self._shadows: list[int] = []
        # Place in the model's list -> place in the request's list; the others get a fresh one.
        self._held = {place: i for i, place in enumerate(self._own)}
        by_kind = {plan.kinds[place]: i for i, place in reversed(list(enumerate(self._own)))}
        for place, kind in enumerate(plan.kinds):
            if place in self._held:
                continue
            if kind not in by_kind and kind[0] in ("KVCache", "RotatingKVCache"):
                by_kind[kind] = len(self._own) + len(self._shadows)
                self._shadows.append(place)
            if kind in by_kind:
                self._held[place] = by_kind[kind]

    def make_caches(self) -> Caches:
        full = make_prompt_cache(self.model)
        return [full[place] for place in self._own + self._shadows]

    def forward(self, inputs: mx.array, caches: Caches) -> mx.array:
        batch, count = inputs.shape[:2]
        boundary = self._boundary
        boundary.clear()
        if self.first:
            tokens = inputs
        else:
            unpacked = unpack(inputs, self._brings, self.hidden_size)
            boundary.incoming, boundary.brought = unpacked
            tokens = mx.zeros((batch, count), mx.int32)
        logits = self.model(tokens, cache=self._spread(caches))
        for shadow in caches[len(self._own) :]:
            marks = mx.zeros((batch, 1, count, 1))
            shadow.update_and_fetch(marks, marks)
        outgoing = self._outgoing()
        boundary.clear()
        return logits if outgoing is None else outgoing

    def _outgoing(self) -> mx.array | None:
        """Hidden states for the next stage, with what is carried on; None on the last stage."""
        boundary = self._boundary
        if self.last:
            return None
        if boundary.outgoing is None:
            raise RuntimeError("the model did not call the last layer of this stage")
        brought = dict(zip(self._brings, boundary.brought, strict=True))
        values = [
            brought[one] if one in brought else boundary.taken[place]
            for place, one in enumerate(self._sends)
        ]
        return pack(boundary.outgoing, self._sends, values)

    def _spread(self, caches: Caches) -> Caches:
        """The full-length list that the model expects."""
        places = range(len(self._plan.kinds))
        if len(self._held) == len(self._plan.kinds):
            return [caches[self._held[place]] for place in places]
        # Nothing may build up in a cache whose contents are never evaluated: new ones each time.
        fresh = make_prompt_cache(self.model)
        return [caches[self._held[p]] if p in self._held else fresh[p] for p in places]
