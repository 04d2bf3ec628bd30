"""Reads safetensors headers, trusting nothing in them. No tensor data is read.

Format: 8 bytes little-endian header length, a JSON header, then the tensors' bytes without gaps.
"""

import math
from pathlib import Path
from typing import Annotated

import msgspec

from pxd.models.errors import ModelError
from pxd.wire import DECODE_ERRORS, Count

MAX_HEADER_BYTES = 100 << 20
_LENGTH_BYTES = 8
_DTYPE_BITS = {
    "F64": 64, "F32": 32, "F16": 16, "BF16": 16,
    "I64": 64, "I32": 32, "I16": 16, "I8": 8,
    "U64": 64, "U32": 32, "U16": 16, "U8": 8, "BOOL": 8,
    "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F4": 4, "C64": 64,
}  # fmt: skip


class TensorInfo(msgspec.Struct, frozen=True):
    """`data_offsets` are the first byte and the one behind the last, from the header's end on."""

    dtype: Annotated[str, msgspec.Meta(max_length=32)]
    shape: Annotated[tuple[Count, ...], msgspec.Meta(max_length=16)]
    data_offsets: tuple[Count, Count]

    @property
    def nbytes(self) -> int:
        return self.data_offsets[1] - self.data_offsets[0]


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Return the tensors of a file. Raises `ModelError` for a damaged, truncated or odd file."""
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(_LENGTH_BYTES), "little")
            if size < _LENGTH_BYTES or length > min(MAX_HEADER_BYTES, size - _LENGTH_BYTES):
                raise _damaged(path, "its header does not fit into it")
            data = file.read(length)
    except OSError as error:
        raise ModelError(f"cannot read {path}: {error.strerror or error}") from error
    tensors = _decode(path, data)
    _check(path, tensors, size - _LENGTH_BYTES - length)
    return tensors


def _damaged(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is damaged or incomplete ({why}); fetch it again")


def _decode(path: Path, data: bytes) -> dict[str, TensorInfo]:
    try:
        entries = msgspec.json.decode(data, type=dict[str, msgspec.Raw])
        return {
            name: msgspec.json.decode(entry, type=TensorInfo)
            for name, entry in entries.items()
            if name != "__metadata__"
        }
    except DECODE_ERRORS as error:
        raise _damaged(path, f"its header is not readable: {error}") from error


def _check(path: Path, tensors: dict[str, TensorInfo], data_size: int) -> None:
    position = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].data_offsets):
        begin, end = tensor.data_offsets
        if begin != position or end < begin:
            raise _damaged(path, f"tensor {name} does not lie behind the one before it")
        bits = _DTYPE_BITS.get(tensor.dtype)
        if bits is not None and math.prod(tensor.shape) * bits != tensor.nbytes * 8:
            raise _damaged(path, f"tensor {name} has not the size of its shape")
        position = end
    if position != data_size:
        raise _damaged(path, f"it holds {data_size} bytes of tensors instead of {position}")
