"""Tensors to and from the bytes of a frame: bit by bit, or coded in one byte for each number."""

import numpy as np
import torch

from pxd.wire import Buffer, Coding, DType, Tensor

_FROM_TORCH: dict[torch.dtype, DType] = {
    torch.bfloat16: "bf16",
    torch.float16: "f16",
    torch.float32: "f32",
}
_TO_TORCH: dict[DType, torch.dtype] = {
    **{dtype: torch_dtype for torch_dtype, dtype in _FROM_TORCH.items()},
    "i32": torch.int32,
}

_GREATEST: dict[Coding, float] = {"fp8": 448.0, "int8": 127.0}
_ROUNDED_DOWN = 1 - 2.0**-22
"""Keeps a scale times the greatest number from being more than what it was made from, which might
be the greatest there is."""

_LEAST_SCALE = 2.0**-126
"""The least normal f32. Rows that would need less, of numbers below 2**-117, become zeros."""


def from_wire(tensor: Tensor, body: Buffer, device: torch.device) -> torch.Tensor:
    """`body` must have the size that `tensor` says; the wire checks that. It is shared, where
    `device` is a CPU and numbers are not coded."""
    if not tensor.nbytes:
        return torch.zeros(tensor.shape, dtype=_TO_TORCH[tensor.dtype], device=device)
    # PyTorch warns of memory that it may not write to.
    data = torch.frombuffer(body if _is_writable(body) else bytearray(body), dtype=torch.uint8)
    data = data.to(device)
    if tensor.coding is None:
        return data.view(_TO_TORCH[tensor.dtype]).reshape(tensor.shape)
    scales = data[: tensor.scale_bytes].view(torch.float32)[:, None]
    values = data[tensor.scale_bytes :].reshape(tensor.shape)
    coded = values.view(torch.float8_e4m3fn if tensor.coding == "fp8" else torch.int8)
    return (coded.to(torch.float32) * scales).to(_TO_TORCH[tensor.dtype])


def _is_writable(body: Buffer) -> bool:
    return not memoryview(body).readonly


def dtype_of(array: torch.Tensor) -> DType:
    """Raises `TypeError` for a type that has no name on the wire."""
    dtype = _FROM_TORCH.get(array.dtype)
    if dtype is None:
        raise TypeError(f"numbers of type {array.dtype} cannot be sent")
    return dtype


def to_wire(array: torch.Tensor, coding: Coding | None = None) -> tuple[Tensor, memoryview]:
    """Code ``(rows, columns)`` as `coding` says, or send what it is. Raises `TypeError` as
    `dtype_of` does.

    Where a number is not finite, all are sent as they are: the last stage then says whose it is.
    """
    dtype, shape = dtype_of(array), tuple(array.shape)
    if coding is not None:
        tensor = Tensor(dtype, shape, coding)
        coded = _coded(array, coding).cpu().numpy()
        if np.isfinite(coded[: tensor.scale_bytes].view("<f4")).all():
            return tensor, coded.data
    data = array.contiguous().view(torch.uint8).flatten().cpu().numpy()
    return Tensor(dtype, shape), data.data


def _coded(array: torch.Tensor, coding: Coding) -> torch.Tensor:
    """A body as bytes; not all of its scales are finite if not all of the numbers are."""
    numbers = array.to(torch.float32)
    # The bits of magnitudes are ordered as they are, with those of no number above all.
    magnitudes = numbers.view(torch.int32) & 0x7FFFFFFF
    greatest = magnitudes.amax(dim=-1, keepdim=True).view(torch.float32)
    scales = greatest * (_ROUNDED_DOWN / _GREATEST[coding])
    scales = torch.where(scales < _LEAST_SCALE, 0.0, scales)
    numbers = numbers * torch.where(scales > 0, 1 / scales, 0.0)
    fp8 = coding == "fp8"
    values = numbers.to(torch.float8_e4m3fn) if fp8 else numbers.round().to(torch.int8)
    return torch.cat([scales.view(torch.uint8).flatten(), values.view(torch.uint8).flatten()])
