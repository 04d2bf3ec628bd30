"""Learns by a dry run how a model uses its layers, and so where it may be cut.

MLX is lazy: the skeleton of a model of any size runs in a moment and no memory, as long as nobody
evaluates anything. In the dry run every layer's output is replaced by a fresh array before the next
layer sees it. Whatever a layer then depends on, other than the array given to it, crosses a cut.
Values that the model hands to its layers can: they are carried along with the hidden state.
"""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import make_prompt_cache

from pxd.executors.mlx.carry import Carried, Path, arrays_in, layout_of, templates_of
from pxd.executors.mlx.crossing import Crossings
from pxd.executors.mlx.layers import CannotSplit, LayerList, Standin, find_layers

DRY_RUN_TOKENS = 3
FURTHER_RUNS = ((2, 4), (2, 2))
"""(batch, tokens) of two more runs, one after the other, which tell the axes of carried values."""

CacheKind = tuple[Any, ...]


@dataclass(frozen=True)
class SplitPlan:
    """What the dry run found.

    `splits` are the layer indices at which the model may be cut; without any, `reason` says why.
    `cache_of` maps a layer to its place in the model's list of caches, `kinds` describes the caches
    in that list; two of equal kind make equal masks. `tuples` is how many values a layer returns,
    None if it returns the hidden state alone, and `hidden_at` where it is given it. `carried` are
    the values that cross a cut besides the hidden state, and `templates` the layers' arguments.
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
    hidden_at: Any = 0
    carried: Mapping[int, tuple[Carried, ...]] = field(default_factory=dict)
    templates: Mapping[int, Mapping[Any, Any]] = field(default_factory=dict)


@dataclass
class _Call:
    """One layer's call: what it was given, and what it returned."""

    layer: int
    arguments: dict[Any, Any]
    filled: list[Any]
    arrays: dict[Path, mx.array]
    made: list[mx.array]
    returned: list[mx.array]
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
        # As they are now: layers may change what they are given.
        arguments, arrays = templates_of(args, kwargs), arrays_in(args, kwargs)
        output = self.layer(*args, **kwargs)
        hidden = output if isinstance(output, mx.array) else output[0]
        fresh = mx.zeros(hidden.shape, hidden.dtype)
        # A cache counts as used by the layer that gets it or fills it.
        filled = [cache for cache in untouched if not cache.empty()]
        given = {id(array) for array in arrays.values()}
        returned = list(arrays_in((output,), {}).values())
        made = [
            array
            for array in (*returned, *arrays_in(args, kwargs).values())
            if id(array) not in given
        ]
        calls.append(
            _Call(number, arguments, filled, arrays, made, returned, output, hidden, fresh)
        )
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
    # The keys of random start values depend on each other through all models made so far.
    mx.eval(mx.random.state)
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
    carried = _carried(model, found, calls, Crossings(calls, tokens, logits))
    shared = _shared(cache_of)
    splits = tuple(cut for cut in range(1, count) if cut in carried and cut not in shared)
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
        hidden_at=_hidden_at(calls),
        carried={cut: carried[cut] for cut in splits},
        templates={call.layer: call.arguments for call in calls} if any(carried.values()) else {},
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
        for argument in (*call.arguments.values(), *call.filled)
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


def _hidden_at(calls: list[_Call]) -> Any:
    """Where layers are given the hidden state: mostly it comes first, by whatever name."""
    for before, after in pairwise(calls):
        for key, value in after.arguments.items():
            if value is before.handed_on:
                return key
    return next(iter(calls[0].arguments))


def _carried(
    model: nn.Module, found: LayerList, calls: list[_Call], crossings: Crossings
) -> dict[int, tuple[Carried, ...]]:
    """What crosses each cut besides the hidden state; cuts that are left out are not allowed."""
    values = {cut: crossings.carried(cut) for cut in range(1, len(calls))}
    for before, after in pairwise(calls):
        if _passes_lengths(before, after, crossings):
            values[after.layer] = None
    wanted = sorted(frozenset().union(*(each for each in values.values() if each)))
    known = _described(model, found, calls, crossings, wanted) if wanted else {}
    return {
        cut: tuple(known[value] for value in sorted(each))
        for cut, each in values.items()
        if each is not None and each <= known.keys()
    }


def _passes_lengths(before: _Call, after: _Call, crossings: Crossings) -> bool:
    """Whether a further value that a layer returned is given to the next one, although it says
    nothing of the tokens: then it is not carried, and yet the next layer's stage lacks it."""
    if isinstance(before.output, mx.array):
        return False
    extras = {id(array) for array in arrays_in(before.output[1:], {}).values()}
    local = {use for v, uses in enumerate(crossings.uses) if crossings.is_local(v) for use in uses}
    return any(
        id(array) in extras and (after.layer, path) in local for path, array in after.arrays.items()
    )


def _described(
    model: nn.Module,
    found: LayerList,
    calls: list[_Call],
    crossings: Crossings,
    wanted: Sequence[int],
) -> dict[int, Carried]:
    """The shapes of values, as far as they are made of one piece for each position.

    Two more runs tell which axis is which, and the types of numbers in a model of 16 bits.
    """
    parameters = model.parameters()
    model.set_dtype(mx.bfloat16)
    caches = make_prompt_cache(model)
    runs = [calls]
    try:
        for size in FURTHER_RUNS:
            runs.append(_dry_run(model, found, caches, mx.zeros(size, mx.int32))[0])
    finally:
        model.update(parameters)
    sizes = [(1, DRY_RUN_TOKENS), *FURTHER_RUNS]
    known = {}
    for value in wanted:
        layer, path = crossings.uses[value][0]
        arrays = [run[layer].arrays[path] for run in runs]
        layout = layout_of([tuple(array.shape) for array in arrays], sizes)
        if layout is not None:
            hidden, last = runs[-1][layer].hidden.dtype, arrays[-1].dtype
            dtype = None if last == hidden else last
            known[value] = Carried(tuple(crossings.uses[value]), *layout, dtype)
    return known
