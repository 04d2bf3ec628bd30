"""Values that a model hands to its layers besides the hidden state, and how they cross a cut.

Some models give every layer what the first one computed, or what they made of the embedding. Where
a model is cut, such values become further columns of the hidden states.
"""

import copy
import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn

Path = tuple[Any, ...]
"""Where an array is in a call: a position or keyword, then items or attributes of what is there."""

PARTS = 3
"""A float32 is the sum of so many numbers of 16 bits: 24 digits are 3 times 8."""


@dataclass(frozen=True)
class Carried:
    """One such value, used by layers at `uses`.

    `shape` is its shape with 1 for the axes `batch` and `position`. `dtype` is None where that is
    the hidden state's own.
    """

    uses: tuple[tuple[int, Path], ...]
    shape: tuple[int, ...]
    batch: int
    position: int
    dtype: mx.Dtype | None

    @property
    def order(self) -> list[int]:
        """Its axes with those of batch and position first."""
        first = [self.batch, self.position]
        return [*first, *(axis for axis in range(len(self.shape)) if axis not in first)]

    def uses_from(self, layer: int) -> list[tuple[int, Path]]:
        return [use for use in self.uses if use[0] >= layer]

    @property
    def numbers(self) -> int:
        """How many for each position."""
        return math.prod(self.shape)


def arrays_in(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Path, mx.array]:
    """All arrays in a call's arguments, but for those that caches hold."""
    found: dict[Path, mx.array] = {}
    for key, value in itertools.chain(enumerate(args), kwargs.items()):
        found.update(_walk(value, (key,)))
    return found


def _walk(value: Any, path: Path) -> Iterator[tuple[Path, mx.array]]:
    if isinstance(value, mx.array):
        yield path, value
    elif isinstance(value, list | tuple):
        for place, item in enumerate(value):
            yield from _walk(item, (*path, place))
    elif _is_bundle(value):
        for name, item in vars(value).items():
            if isinstance(item, mx.array):
                yield (*path, name), item


def _is_bundle(value: Any) -> bool:
    """Whether it is a plain object of the model's own, such as one that collects arrays."""
    own = type(value).__module__.startswith("mlx_lm.models.")
    is_cache = hasattr(value, "update_and_fetch") or hasattr(value, "make_mask")
    return own and not is_cache and not isinstance(value, nn.Module)


def templates_of(args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[Any, Any]:
    """What stands at each place of a call, as it is now."""
    return {
        key: copy.copy(value) if _is_bundle(value) else value
        for key, value in itertools.chain(enumerate(args), kwargs.items())
    }


def at(path: Path, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
    """What is at `path` in a call. Raises LookupError, AttributeError or TypeError."""
    key, *steps = path
    value = args[key] if isinstance(key, int) else kwargs[key]
    for step in steps:
        value = getattr(value, step) if isinstance(step, str) else value[step]
    return value


def put(
    values: Mapping[Path, mx.array],
    templates: Mapping[Any, Any],
    args: Sequence[Any],
    kwargs: Mapping[str, Any],
) -> tuple[list[Any], dict[str, Any]]:
    """The call's arguments with other arrays at some paths, in copies of the `templates`."""
    args, kwargs = list(args), dict(kwargs)
    places = {path[0] for path in values}
    for key in places:
        inner = {path[1:]: value for path, value in values.items() if path[0] == key}
        whole = _rebuilt(templates[key], inner)
        if isinstance(key, int):
            args[key] = whole
        else:
            kwargs[key] = whole
    return args, kwargs


def _rebuilt(template: Any, values: Mapping[Path, mx.array]) -> Any:
    if () in values:
        return values[()]
    if isinstance(template, list | tuple):
        items = [
            _rebuilt(item, {path[1:]: v for path, v in values.items() if path[0] == place})
            for place, item in enumerate(template)
        ]
        return items if isinstance(template, list) else tuple(items)
    if not values:
        return template
    whole = copy.copy(template)
    for (name, *_), value in values.items():
        setattr(whole, name, value)
    return whole


def layout_of(
    shapes: Sequence[tuple[int, ...]], sizes: Sequence[tuple[int, int]]
) -> tuple[tuple[int, ...], int, int] | None:
    """(shape, batch axis, position axis) of a value that had these `shapes` in calls of these
    `sizes`, each (batch, positions); None if it is not made of one piece for each position."""
    if len({len(shape) for shape in shapes}) != 1:
        return None
    batches, positions = (tuple(size[i] for size in sizes) for i in (0, 1))
    lengths = list(zip(*shapes, strict=True))
    varying = [axis for axis, length in enumerate(lengths) if len(set(length)) > 1]
    if sorted(lengths[axis] for axis in varying) != sorted([batches, positions]):
        return None
    shape = tuple(1 if axis in varying else n for axis, n in enumerate(shapes[0]))
    return shape, lengths.index(batches), lengths.index(positions)


def columns(carried: Sequence[Carried], hidden: mx.Dtype) -> int:
    """How many columns these values take beside a hidden state of this type."""
    return sum(one.numbers * _parts(one, hidden) for one in carried)


def _parts(one: Carried, hidden: mx.Dtype) -> int:
    return 1 if one.dtype is None or hidden == mx.float32 else PARTS


def pack(hidden: mx.array, carried: Sequence[Carried], values: Sequence[mx.array]) -> mx.array:
    """Append values to hidden states ``(batch, n, hidden)`` as columns."""
    found = [hidden]
    for one, value in zip(carried, values, strict=True):
        moved = value.transpose(one.order)
        rest = moved.reshape(*moved.shape[:2], -1)
        for _ in range(_parts(one, hidden.dtype) - 1):
            part = rest.astype(hidden.dtype)
            found.append(part)
            rest = rest.astype(mx.float32) - part.astype(mx.float32)
        found.append(rest.astype(hidden.dtype))
    return mx.concatenate(found, axis=-1) if len(found) > 1 else hidden


def unpack(
    packed: mx.array, carried: Sequence[Carried], hidden_size: int
) -> tuple[mx.array, list[mx.array]]:
    """What `pack` was given."""
    values, begin = [], hidden_size
    for one in carried:
        parts = []
        for _ in range(_parts(one, packed.dtype)):
            parts.append(packed[..., begin : begin + one.numbers])
            begin += one.numbers
        flat = parts[-1]
        for part in reversed(parts[:-1]):
            flat = part.astype(mx.float32) + flat.astype(mx.float32)
        if one.dtype is not None:
            flat = flat.astype(one.dtype)
        moved = flat.reshape(*flat.shape[:2], *(one.shape[axis] for axis in one.order[2:]))
        values.append(moved.transpose([one.order.index(axis) for axis in range(len(one.shape))]))
    return packed[..., :hidden_size], values
