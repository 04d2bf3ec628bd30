"""Arrays to and from the bytes of a frame, bit by bit."""

import mlx.core as mx
import numpy as np

from pxd.wire import Buffer, DType, Tensor

_FROM_MLX: dict[mx.Dtype, DType] = {
    mx.bfloat16: "bf16",
    mx.float16: "f16",
    mx.float32: "f32",
}
# numpy knows no bfloat16; its bits travel as integers.
_NUMPY: dict[DType, str] = {"bf16": "<u2", "f16": "<f2", "f32": "<f4", "i32": "<i4"}


def from_wire(tensor: Tensor, body: Buffer) -> mx.array:
    """`body` must have the size that `tensor` says; the wire checks that."""
    array = mx.array(np.frombuffer(body, _NUMPY[tensor.dtype]).reshape(tensor.shape))
    return array.view(mx.bfloat16) if tensor.dtype == "bf16" else array


def dtype_of(array: mx.array) -> DType:
    """Raises `TypeError` for a type that has no name on the wire."""
    dtype = _FROM_MLX.get(array.dtype)
    if dtype is None:
        raise TypeError(f"numbers of type {array.dtype} cannot be sent")
    return dtype


def to_wire(array: mx.array) -> tuple[Tensor, memoryview]:
    """Raises `TypeError` as `dtype_of` does."""
    dtype = dtype_of(array)
    bits = array.view(mx.uint16) if dtype == "bf16" else array
    data = np.ascontiguousarray(np.array(bits, copy=False))
    return Tensor(dtype, tuple(array.shape)), data.data.cast("B")
