"""Weights that makers of models store in 8 bits of floating point, with scales for blocks."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.weights.stored import Computed, Stored, Tensors, check, dtype_of

_SCALE = "_scale_inv"


def block_of(config: Mapping[str, Any]) -> tuple[int, int] | None:
    """Rows and columns of a block; None where a tensor has one scale. Raises `ExecutorError`."""
    found = config.get("weight_block_size")
    if found is None:
        return None
    sides = tuple(found) if isinstance(found, list | tuple) else ()
    if len(sides) != 2 or not all(isinstance(side, int) and side > 0 for side in sides):
        raise ExecutorError("config.json says a weight_block_size that cannot be right")
    return sides[0], sides[1]


def dequantize(
    weight: torch.Tensor, scales: torch.Tensor, block: tuple[int, int] | None
) -> torch.Tensor:
    """`weight` ``(..., rows, columns)`` times its block's scale, in float32.

    Blocks at the ends may be smaller than the others.
    """
    if block is None:
        return weight.float() * scales.float()
    rows, columns = weight.shape[-2:]
    wide = scales.float().repeat_interleave(block[1], dim=-1)[..., :columns]
    return weight.float() * wide.repeat_interleave(block[0], dim=-2)[..., :rows, :]


def dense(
    tensors: Tensors, dtype: torch.dtype, *, block: tuple[int, int] | None
) -> dict[str, Stored]:
    """The same weights, not quantised. Raises `ExecutorError` where parts do not fit."""
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        if name.endswith(_SCALE) and name.removesuffix(_SCALE) in tensors:
            continue
        scales = tensors.get(name + _SCALE)
        if scales is None:
            check(not tensor.get_dtype().startswith("F8"), name)
            made[name] = tensor
            continue
        check(tensor.get_dtype() == "F8_E4M3", name)
        dtype_of(scales, name + _SCALE)
        *others, rows, columns = tensor.get_shape()
        if block is None:
            check(scales.get_shape() in ([], [1]), name + _SCALE)
        else:
            blocks = [*others, -(-rows // block[0]), -(-columns // block[1])]
            check(scales.get_shape() == blocks, name + _SCALE)
        make = partial(dequantize, block=block)
        made[name] = Computed((tensor, scales), [*others, rows, columns], dtype, make)
    return made
