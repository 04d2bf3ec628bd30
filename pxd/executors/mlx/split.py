"""Learns by a dry run how a model uses its layers, and so where it may be cut.

MLX is lazy: the skeleton of a model of any size runs in a moment and no memory, as long as nobody
evaluates anything. In the dry run every layer's output is replaced by a fresh array before the next
layer sees it. Whatever a layer then depends on, other than the array given to it, crosses a cut.
"""

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from pxd.executors.mlx.graph import DependencyGraph
from pxd.executors.mlx.layers import CannotSplit, LayerList, Standin, find_layers

DRY_RUN_TOKENS = 3

CacheKind = tuple[Any, ...]


@dataclass(frozen=True)
class SplitPlan:
    """What the dry run found.

    `splits` are the layer indices at which the model may be cut; without any, `reason` says why.
    `cache_of` maps a layer to its place in the model's list of caches, `kinds` describes the caches
    in that list; two of equal kind make equal masks. `tuples` is how many values a layer returns,
    None if it returns the hidden state alone.
    """

    layers: int
    hidden_size: int
    vocabulary: int
    splits: tuple[int, ...]
    reason: str
    kinds: tuple[CacheKind, ...] = ()
    cache_of: dict[int, int] = field(default_factory=dict)
    token_bytes: tuple[int, ...] = ()
    tuples: int | None = None


@dataclass
class _Call:
    """One layer's call: what it was given besides the hidden state, and what it returned."""

    layer: int
    arguments: list[Any]
    output: Any
    hidden: mx.array
    handed_on: mx.array


class _Probe(Standin):
    def __init__(
        self, layer: nn.Module, number: int, calls: list[_Call], caches: list[Any]
    ) -> None:
        super().__init__(layer)
        self.hide("record", (number, calls, caches))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        number, calls, caches = self.record
        untouched = [cache for cache in caches if cache.empty()]
        output = self.layer(*args, **kwargs)
        hidden = output if isinstance(output, mx.array) else output[0]
        fresh = mx.zeros(hidden.shape, hidden.dtype)
        # A cache counts as used by the layer that gets it or fills it.
        filled = [cache for cache in untouched if not cache.empty()]
        # The first argument is the hidden state, by whatever name.
        arguments = [*[*args, *kwargs.values()][1:], *filled]
        calls.append(_Call(number, arguments, output, hidden, fresh))
        return fresh if isinstance(output, mx.array) else (fresh, *output[1:])


def cache_kind(cache: Any) -> CacheKind:
    name = type(cache).__name__
    if name == "CacheList":
        return (name, *(cache_kind(part) for part in cache.caches))
    window = getattr(cache, "max_size", None) or getattr(cache, "chunk_size", None)
    return (name, window, len(cache.cache) if name == "ArraysCache" else None)


def cache_token_bytes(cache: Any) -> int:
    """Bytes that one more position takes in a cache that is in use; 0 for fixed-size state."""
    if hasattr(cache, "caches"):
        return sum(cache_token_bytes(part) for part in cache.caches)
    arrays = (getattr(cache, "keys", None), getattr(cache, "values", None))
    return sum(
        array.nbytes // array.shape[2]
        for array in arrays
        if isinstance(array, mx.array) and array.ndim == 4 and array.shape[2]
    )


def plan_split(model: nn.Module) -> SplitPlan:
    """Dry-run `model`, of which nothing needs to be loaded. Raises `CannotSplit`.

    What the model itself raises in the dry run comes through: it would do so in use.
    """
    found = find_layers(model)
    caches = make_prompt_cache(model)
    tokens = mx.zeros((1, DRY_RUN_TOKENS), mx.int32)
    calls, logits = _dry_run(model, found, caches, tokens)
    count = len(found.layers)
    if [call.layer for call in calls] != list(range(count)):
        raise CannotSplit("its layers are not called once each and in order")
    tuples = {None if isinstance(c.output, mx.array) else len(c.output) for c in calls}
    shapes = {(tuple(call.hidden.shape), call.hidden.dtype) for call in calls}
    if len(tuples) > 1 or len(shapes) > 1:
        raise CannotSplit("its layers do not all return the same kind of hidden state")
    hidden_shape = calls[0].hidden.shape
    if len(hidden_shape) != 3 or tuple(hidden_shape[:2]) != (1, DRY_RUN_TOKENS):
        raise CannotSplit(f"its hidden state has the unusual shape {tuple(hidden_shape)}")
    cache_of = _match_caches(calls, caches)
    crossed = _crossed(calls, tokens, logits) | _shared(cache_of)
    splits = tuple(cut for cut in range(1, count) if cut not in crossed)
    return SplitPlan(
        layers=count,
        hidden_size=hidden_shape[2],
        vocabulary=logits.shape[-1],
        splits=splits,
        reason="" if splits or count == 1 else "more than the hidden state crosses every layer",
        kinds=tuple(cache_kind(cache) for cache in caches),
        cache_of=cache_of,
        token_bytes=tuple(cache_token_bytes(cache) for cache in caches),
        tuples=tuples.pop(),
    )


def _dry_run(
    model: nn.Module, found: LayerList, caches: list[Any], tokens: mx.array
) -> tuple[list[_Call], mx.array]:
    calls: list[_Call] = []
    layers = list(found.layers)
    # Calls of one compiled function look like one and the same node of the graph.
    mx.disable_compile()
    found.replace([_Probe(layer, i, calls, caches) for i, layer in enumerate(layers)])
    try:
        logits = model(tokens, cache=caches)
    finally:
        found.replace(layers)
        mx.enable_compile()
    return calls, logits


def _match_caches(calls: list[_Call], caches: list[Any]) -> dict[int, int]:
    places = {id(cache): place for place, cache in enumerate(caches)}
    return {
        call.layer: places[id(argument)]
        for call in calls
        for argument in call.arguments
        if id(argument) in places
    }


def _shared(cache_of: dict[int, int]) -> set[int]:
    """Cuts between layers that use the same cache."""
    crossed: set[int] = set()
    for place, uses in Counter(cache_of.values()).items():
        if uses > 1:
            users = [layer for layer, used in cache_of.items() if used == place]
            crossed.update(range(min(users) + 1, max(users) + 1))
    return crossed


def _crossed(calls: list[_Call], tokens: mx.array, logits: mx.array) -> set[int]:
    """Cuts that something besides the hidden state would have to cross."""
    count = len(calls)
    arrays = {"given_0": tokens, f"made_{count}": logits}
    for call in calls:
        arrays[f"made_{call.layer}"] = call.hidden
        arrays[f"given_{call.layer + 1}"] = call.handed_on
    graph = DependencyGraph(arrays)
    crossed: set[int] = set()
    for user in range(count + 1):
        for source in graph.sources(f"made_{user}"):
            # What comes from layer n, or was given to it, is known in its stage only.
            layer = int(source.partition("_")[2])
            crossed.update(range(layer + 1, user + 1))
    for before, after in pairwise(calls):
        if _passes_extras(before, after):
            crossed.add(after.layer)
    return crossed


def _passes_extras(before: _Call, after: _Call) -> bool:
    """Whether a further value that a layer returned is given to the next one."""
    if isinstance(before.output, mx.array):
        return False
    extras = {id(array) for array in _arrays(before.output[1:])}
    return any(id(array) in extras for array in _arrays(after.arguments))


def _arrays(value: Any) -> Iterator[mx.array]:
    if isinstance(value, mx.array):
        yield value
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _arrays(item)
    elif isinstance(value, dict):
        yield from _arrays(list(value.values()))
