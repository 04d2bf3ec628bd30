"""Weights as mlx-lm stores them.

A quantised weight is its group's scale times a small number, plus the group's bias. The experts of
a layer are in one tensor; they are given one by one, as makers of models store them.
"""

import math
import re
from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.weights.stored import (
    PIECE,
    Computed,
    Stored,
    Tensors,
    check,
    dtype_of,
    part_of,
    spread_modules,
)

_BITS = (2, 3, 4, 5, 6, 8)
_GROUPS = (32, 64, 128)
_STACKED = re.compile(r"(.*\.)(?:switch_mlp|experts)\.(gate_proj|up_proj|down_proj)\.weight")
_OLDER = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}


class Packing(NamedTuple):
    """How many bits a weight has, and how many weights have a scale and a bias in common."""

    bits: int
    group: int


class Packings:
    """What config.json says of MLX's quantisation, by the names of modules."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        """Raises `ExecutorError` for a way that this executor does not read."""
        self._own = {
            name: _packing(value) for name, value in config.items() if isinstance(value, Mapping)
        }
        self._usual = _packing(config)

    def of(self, module: str) -> Packing:
        return self._own.get(module, self._usual)


def _packing(config: Mapping[str, Any]) -> Packing:
    mode, bits, group = config.get("mode", "affine"), config.get("bits"), config.get("group_size")
    if mode != "affine":
        raise ExecutorError(
            f"it is quantised in MLX's mode {mode}, which only the mlx executor reads"
        )
    if bits not in _BITS or group not in _GROUPS:
        raise ExecutorError(f"MLX has no quantisation of {bits} bits in groups of {group}")
    return Packing(bits, group)


def dequantize(
    packed: torch.Tensor, scales: torch.Tensor, biases: torch.Tensor, packing: Packing
) -> torch.Tensor:
    """``(..., n)`` of the type of `scales` ``(..., n / group)``, from `packed` words of 32 bits.

    Rounded once, as good as what MLX multiplies by; `mlx.core.dequantize` rounds products, too.
    """
    size = scales.shape[-1] * packing.group
    rows = [tensor.reshape(-1, tensor.shape[-1]) for tensor in (packed, scales, biases)]
    out = scales.new_empty(*scales.shape[:-1], size)
    step = max(1, PIECE // size)
    for place, *parts in zip(*(t.split(step) for t in (out.view(-1, size), *rows)), strict=True):
        numbers = _unpacked(parts[0], packing.bits).unflatten(-1, (-1, packing.group))
        scale, bias = (part[..., None].float() for part in parts[1:])
        place[:] = (numbers.float() * scale + bias).flatten(-2)
    return out


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """Each row of words is one stream of bits, the lowest first."""
    period = math.lcm(8, bits)
    width = period // 8
    stream = packed.contiguous().view(torch.uint8)
    if width > 1:
        read = stream.unflatten(-1, (-1, width)).long()
        stream = (read << 8 * torch.arange(width)).sum(-1)
    shifts = range(0, period, bits)
    mask = (1 << bits) - 1
    return torch.stack([stream >> shift & mask for shift in shifts], dim=-1).flatten(-2)


def dense(tensors: Tensors, packings: Packings) -> dict[str, Stored]:
    """The same weights, not quantised. Raises `ExecutorError` where parts do not fit."""
    return spread_modules(
        tensors,
        ("weight", "scales", "biases"),
        "scales",
        lambda module: _spread_out(module, tensors, packings.of(module)),
    )


def _spread_out(module: str, tensors: Tensors, packing: Packing) -> Computed:
    name = f"{module}.weight"
    weight, scales = tensors[name], tensors[f"{module}.scales"]
    biases = part_of(tensors, f"{module}.biases")
    *rows, groups = scales.get_shape()
    *same, words = weight.get_shape()
    fits = words * 32 == groups * packing.group * packing.bits and rows == same
    check(fits and weight.get_dtype() == "U32", name)
    check(biases.get_shape() == scales.get_shape(), f"{module}.biases")
    shape = [*rows, groups * packing.group]
    parts = weight, scales, biases
    return Computed(
        parts, shape, dtype_of(scales, f"{module}.scales"), partial(dequantize, packing=packing)
    )


class _Expert:
    """One expert of a tensor that has those of a layer."""

    def __init__(self, stacked: Stored, number: int) -> None:
        self._stacked, self._number = stacked, number

    def get_shape(self) -> list[int]:
        return self._stacked.get_shape()[1:]

    def get_dtype(self) -> str:
        return self._stacked.get_dtype()

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._stacked[self._number][index]


def one_by_one(tensors: Tensors) -> dict[str, Stored]:
    """The same weights, where experts of a layer were together with each under a name of its own.

    The older names are those that models with a `block_sparse_moe` have in their makers' files.
    """
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        match = _STACKED.fullmatch(name)
        made |= dict(_experts(match, tensor) if match else [(name, tensor)])
    return made


def _experts(match: re.Match[str], stacked: Stored) -> Iterator[tuple[str, Stored]]:
    place, kind = match.groups()
    kind = _OLDER[kind] if place.endswith(".block_sparse_moe.") else kind
    for number in range(stacked.get_shape()[0]):
        yield f"{place}experts.{number}.{kind}.weight", _Expert(stacked, number)
