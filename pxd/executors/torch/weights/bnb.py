"""Weights as bitsandbytes stores them: 8 bits with a scale for each row, or 4 bits in blocks.

In 4 bits a weight is one of 16 numbers times its block's scale. Scales may be stored so, too.
"""

import math
from functools import partial
from typing import Annotated

import msgspec
import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.weights.stored import Computed, Stored, Tensors, check, part_of

_STATES = tuple(f".quant_state.bitsandbytes__{kind}" for kind in ("nf4", "fp4"))
_PARTS = (".absmax", ".quant_map", ".nested_absmax", ".nested_quant_map", *_STATES)
_MOST_STATE = 4096
_GREATEST = 127

_Size = Annotated[int, msgspec.Meta(ge=1, le=1 << 40)]


class State(msgspec.Struct, frozen=True):
    """What is said of a weight in 4 bits. There are `nested_blocksize` scales with one scale, where
    those are quantised; `nested_offset` is added to them."""

    blocksize: _Size
    shape: tuple[_Size, _Size]
    nested_blocksize: _Size = 1
    nested_offset: float = 0.0


def dequantize_8bit(weight: torch.Tensor, greatest: torch.Tensor) -> torch.Tensor:
    """`weight` ``(out, in)``, of which 127 means what is `greatest` ``(out,)``; in float32."""
    return weight.float() * (greatest.float() / _GREATEST)[:, None]


def dequantize_4bit(
    packed: torch.Tensor,
    scales: torch.Tensor,
    numbers: torch.Tensor,
    nested_scales: torch.Tensor | None = None,
    nested_numbers: torch.Tensor | None = None,
    *,
    state: State,
) -> torch.Tensor:
    """``(out, in)`` in float32, from bytes with two weights each, the first in the upper half."""
    scales = scales.flatten()
    if nested_scales is not None and nested_numbers is not None:
        scales = _times(nested_numbers[scales.int()], nested_scales, state.nested_blocksize)
        scales = scales + state.nested_offset
    packed = packed.flatten().view(torch.uint8)
    halves = torch.stack([packed >> 4, packed & 15], dim=-1).flatten()
    return _times(numbers[halves.int()], scales, state.blocksize).view(state.shape)


def _times(numbers: torch.Tensor, scales: torch.Tensor, size: int) -> torch.Tensor:
    return numbers * scales.repeat_interleave(size)[: len(numbers)]


def dense(tensors: Tensors, dtype: torch.dtype) -> dict[str, Stored]:
    """The same weights, not quantised. Raises `ExecutorError` where parts do not fit."""
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        module = name.rpartition(".")[0]
        if f"{module}.weight" in tensors and name.endswith((".SCB", ".weight_format")):
            continue
        if any(name.endswith(part) and name.removesuffix(part) in tensors for part in _PARTS):
            continue
        states = [state for state in _STATES if name + state in tensors]
        if states:
            made[name] = _of_4bit(name, tensors, tensors[name + states[0]], dtype)
        elif name == f"{module}.weight" and f"{module}.SCB" in tensors:
            made[name] = _of_8bit(name, tensor, tensors[f"{module}.SCB"], dtype)
        else:
            check(tensor.get_dtype() not in ("I8", "U8"), name)
            made[name] = tensor
    return made


def _of_8bit(name: str, weight: Stored, greatest: Stored, dtype: torch.dtype) -> Computed:
    shape = weight.get_shape()
    check(weight.get_dtype() == "I8" and greatest.get_shape() == shape[:1], name)
    return Computed((weight, greatest), shape, dtype, dequantize_8bit)


def _of_4bit(name: str, tensors: Tensors, said: Stored, dtype: torch.dtype) -> Computed:
    state = _read_state(name, said)
    packed = tensors[name]
    scales, numbers = (part_of(tensors, f"{name}.{part}") for part in ("absmax", "quant_map"))
    parts: tuple[Stored, ...] = packed, scales, numbers
    size = state.shape[0] * state.shape[1]
    blocks = -(-size // state.blocksize)
    check(packed.get_dtype() == "U8" and math.prod(packed.get_shape()) * 2 == size, name)
    check(scales.get_shape() == [blocks] and numbers.get_shape() == [16], f"{name}.absmax")
    if scales.get_dtype() == "U8":
        nested, own = (
            part_of(tensors, f"{name}.nested_{part}") for part in ("absmax", "quant_map")
        )
        check(nested.get_shape() == [-(-blocks // state.nested_blocksize)], f"{name}.nested_absmax")
        check(own.get_shape() == [256], f"{name}.nested_quant_map")
        parts = *parts, nested, own
    return Computed(parts, list(state.shape), dtype, partial(dequantize_4bit, state=state))


def _read_state(name: str, said: Stored) -> State:
    check(said.get_dtype() == "U8" and said.get_shape()[0] <= _MOST_STATE, name)
    try:
        return msgspec.json.decode(bytes(said[...].tolist()), type=State)
    except msgspec.DecodeError as error:
        raise ExecutorError(f"{name} says that it is quantised oddly: {error}") from error
