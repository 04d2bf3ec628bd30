"""Arrays to and from the bytes of a frame: bit by bit, or coded in one byte for each number."""

import mlx.core as mx
import numpy as np

from pxd.wire import Buffer, Coding, DType, Tensor

_FROM_MLX: dict[mx.Dtype, DType] = {
    mx.bfloat16: "bf16",
    mx.float16: "f16",
    mx.float32: "f32",
}
_TO_MLX = {dtype: mlx for mlx, dtype in _FROM_MLX.items()}
# numpy knows no bfloat16; its bits travel as integers.
_NUMPY: dict[DType, str] = {"bf16": "<u2", "f16": "<f2", "f32": "<f4", "i32": "<i4"}

_GREATEST: dict[Coding, float] = {"fp8": 448.0, "int8": 127.0}
_ROUNDED_DOWN = 1 - 2.0**-22
"""Keeps a scale times the greatest number from being more than what it was made from, which might
be the greatest there is."""

_LEAST_SCALE = 2.0**-126
"""The least normal f32. Rows that would need less, of numbers below 2**-117, become zeros."""


def from_wire(tensor: Tensor, body: Buffer) -> mx.array:
    """`body` must have the size that `tensor` says; the wire checks that."""
    if tensor.coding is not None:
        return _decoded(tensor, tensor.coding, body)
    array = mx.array(np.frombuffer(body, _NUMPY[tensor.dtype]).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.dtype == "bf16" else array


def mlx_dtype(dtype: DType) -> mx.Dtype:
    """Raises `KeyError` for integers, which no hidden states are."""
    return _TO_MLX[dtype]


def dtype_of(array: mx.array) -> DType:
    """Raises `TypeError` for a type that has no name on the wire."""
    dtype = _FROM_MLX.get(array.dtype)
    if dtype is None:
        raise TypeError(f"numbers of type {array.dtype} cannot be sent")
    return dtype


def to_wire(array: mx.array, coding: Coding | None = None) -> tuple[Tensor, memoryview]:
    """Code ``(rows, columns)`` as `coding` says, or send what it is. Raises `TypeError` as
    `dtype_of` does.

    Where a number is not finite, all are sent as they are: the last stage then says whose it is.
    """
    dtype, shape = dtype_of(array), tuple(array.shape)
    if coding is not None:
        tensor = Tensor(dtype, shape, coding)
        coded = np.array(_coded(array, coding), copy=False)
        if np.isfinite(coded[: tensor.scale_bytes].view("<f4")).all():
            return tensor, coded.data
    bits = array.view(mx.uint16) if dtype == "bf16" else array
    data = np.ascontiguousarray(np.array(bits, copy=False))
    return Tensor(dtype, shape), data.data.cast("B")


def _coded(array: mx.array, coding: Coding) -> mx.array:
    """A body as bytes; not all of its scales are finite if not all of the numbers are."""
    numbers = array.astype(mx.float32)
    # The bits of magnitudes are ordered as they are, with those of no number above all.
    magnitudes = numbers.view(mx.uint32) & 0x7FFFFFFF
    greatest = magnitudes.max(axis=-1, keepdims=True).view(mx.float32)
    scales = greatest * (_ROUNDED_DOWN / _GREATEST[coding])
    scales = mx.where(scales < _LEAST_SCALE, 0, scales)
    numbers = numbers * mx.where(scales > 0, 1 / scales, 0)
    if coding == "fp8":
        values = mx.to_fp8(numbers)
    else:
        values = mx.round(numbers).astype(mx.int8).view(mx.uint8)
    return mx.concatenate([scales.view(mx.uint8).flatten(), values.flatten()])


def _decoded(tensor: Tensor, coding: Coding, body: Buffer) -> mx.array:
    rows = tensor.shape[0]
    scales = mx.array(np.frombuffer(body, "<f4", rows).reshape(rows, 1))
    values = np.frombuffer(body, np.uint8, offset=tensor.scale_bytes).reshape(tensor.shape)
    if coding == "fp8":
        numbers = mx.from_fp8(mx.array(values), mx.float32)
    else:
        numbers = mx.array(values.view(np.int8))
    return (numbers * scales).astype(_TO_MLX[tensor.dtype])
