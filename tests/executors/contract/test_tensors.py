"""Arrays through the bytes of a frame and back, exactly or coded."""

import math
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from pxd.executors.choice import installed_kinds
from pxd.executors.mlx import tensors as mlx_tensors
from pxd.wire import Buffer, Coding, Tensor

DTYPES = {"bf16": mx.bfloat16, "f16": mx.float16, "f32": mx.float32}
# Half a unit in the last place of each type, relative, and that of its least numbers.
ROUNDING = {"bf16": 2.0**-8, "f16": 2.0**-11, "f32": 2.0**-23}
LEAST = {"bf16": 2.0**-126, "f16": 2.0**-24, "f32": 2.0**-126}
FLUSHED = 2.0**-117
"""Numbers of rows with nothing greater may become zeros."""

codings = st.sampled_from(["fp8", "int8"])
shapes = st.tuples(st.integers(1, 5), st.integers(1, 70))
everything = hnp.arrays(np.float32, shapes, elements=st.floats(width=32, allow_nan=False))
# Rows of one magnitude each, for numbers drawn freely are nearly all lost beside the greatest.
alike = st.builds(
    lambda numbers, exponents: (numbers * 2.0 ** np.array(exponents)[:, None]).astype(np.float32),
    hnp.arrays(np.float32, (3, 40), elements=st.floats(-1, 1, width=32)),
    st.tuples(*[st.integers(-140, 127)] * 3),
)


def as_f32(array: mx.array) -> np.ndarray:
    return np.array(array.astype(mx.float32))


def bits(array: mx.array) -> bytes:
    return np.array(array.view(mx.uint8)).tobytes()


kinds = st.sampled_from(installed_kinds())
"""Of executors. What is compared is made and read by MLX, which keeps the bits."""


def to_wire(
    array: mx.array, coding: Coding | None = None, kind: str = "mlx"
) -> tuple[Tensor, memoryview]:
    if kind == "mlx":
        return mlx_tensors.to_wire(array, coding)
    from pxd.executors.torch import tensors

    return tensors.to_wire(in_torch(array), coding)


def from_wire(tensor: Tensor, body: Buffer, kind: str = "mlx") -> mx.array:
    if kind == "mlx":
        return mlx_tensors.from_wire(tensor, body)
    import torch

    from pxd.executors.torch import tensors

    made = tensors.from_wire(tensor, body, torch.device("cpu"))
    # Through bytes, for numpy knows no bfloat16.
    bits = made.contiguous().view(torch.uint8).numpy().reshape(-1)
    return mx.array(bits).view(DTYPES[tensor.dtype]).reshape(tensor.shape)


def in_torch(array: mx.array) -> Any:
    import torch

    dtype = {mx.bfloat16: torch.bfloat16, mx.float16: torch.float16, mx.float32: torch.float32}
    data = bytearray(bits(array))
    return torch.frombuffer(data, dtype=dtype[array.dtype]).reshape(tuple(array.shape))


def round_trip(
    array: mx.array, coding: Coding | None, kind: str = "mlx"
) -> tuple[Tensor, mx.array]:
    tensor, body = to_wire(array, coding, kind)
    assert body.nbytes == tensor.nbytes
    back = from_wire(tensor, bytes(body), kind)
    assert (back.dtype, back.shape) == (array.dtype, array.shape)
    return tensor, back


def e4m3(byte: int) -> float:
    """From the definition of the format."""
    sign, exponent, fraction = byte >> 7, byte >> 3 & 15, byte & 7
    if (exponent, fraction) == (15, 7):
        return math.nan
    size = (fraction / 8 + (exponent > 0)) * 2.0 ** (max(exponent, 1) - 7)
    return -size if sign else size


@example(np.array([[0, 1e-44, -1e-44], [0, 1e-39, 1e-41]], np.float32), "f32", "int8", "mlx")
@example(np.array([[0, 1e-44, -1e-44], [0, 1e-39, 1e-41]], np.float32), "bf16", "fp8", "mlx")
@given(everything | alike, st.sampled_from(sorted(DTYPES)), codings, kinds)
def test_what_a_coding_changes_is_bounded(
    array: np.ndarray, dtype: str, coding: Coding, kind: str
) -> None:
    sent = mx.array(array).astype(DTYPES[dtype])
    numbers = as_f32(sent).astype(np.float64)
    tensor, back = round_trip(sent, coding, kind)
    if not np.isfinite(numbers).all():
        assert tensor.coding is None
        assert bits(back) == bits(sent)
        return
    assert tensor.coding == coding
    greatest = np.abs(numbers).max(axis=-1, keepdims=True)
    # Half a step: an int8's is the same everywhere, an fp8's goes with the number down to 2**-9.
    if coding == "int8":
        step = greatest / 127 / 2 * np.ones_like(numbers)
    else:
        step = np.maximum(np.abs(numbers) / 16, greatest / 448 * 2.0**-10)
    allowed = step * 1.001 + np.abs(numbers) * ROUNDING[dtype] + LEAST[dtype]
    allowed = np.where(greatest < FLUSHED, greatest, allowed)
    assert (np.abs(as_f32(back) - numbers) <= allowed).all()
    assert (as_f32(back)[numbers == 0] == 0).all()


@given(everything, st.sampled_from(sorted(DTYPES)), kinds)
def test_uncoded_is_bit_by_bit(array: np.ndarray, dtype: str, kind: str) -> None:
    sent = mx.array(array).astype(DTYPES[dtype])
    tensor, back = round_trip(sent, None, kind)
    assert tensor == Tensor(dtype, array.shape)  # type: ignore[arg-type]
    assert bits(back) == bits(sent)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("coding", ["fp8", "int8"])
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("columns", [1, 7, 64, 1027])
def test_what_is_not_finite_is_still_so_at_the_other_end(
    kind: str, dtype: str, coding: Coding, bad: float, columns: int
) -> None:
    array = np.ones((3, columns), np.float32)
    array[1, columns // 2] = bad
    sent = mx.array(array).astype(DTYPES[dtype])
    tensor, back = round_trip(sent, coding, kind)
    assert tensor.coding is None
    assert bits(back) == bits(sent)


@pytest.mark.parametrize("coding", ["fp8", "int8"])
def test_a_row_does_not_depend_on_those_beside_it(kind: str, coding: Coding) -> None:
    """Or a request's answer would depend on who shares its batch."""
    rows = mx.random.normal((4, 33), key=mx.random.key(1)) * mx.array([[1e-6], [1], [1e6], [0]])
    _, together = round_trip(rows, coding, kind)
    for i in range(4):
        _, alone = round_trip(rows[i : i + 1], coding, kind)
        assert bits(alone) == bits(together[i : i + 1])


@pytest.mark.parametrize("coding", ["fp8", "int8"])
def test_the_greatest_number_of_all_stays_finite(kind: str, coding: Coding) -> None:
    for dtype in DTYPES.values():
        greatest = mx.finfo(dtype).max
        _, back = round_trip(mx.array([[greatest, -greatest, 1.0]]).astype(dtype), coding, kind)
        assert np.isfinite(as_f32(back)).all()


@pytest.mark.parametrize("coding", ["fp8", "int8"])
def test_the_body_is_scales_and_then_bytes(kind: str, coding: Coding) -> None:
    """Every kind of executor reads what any other has sent."""
    array = np.random.default_rng(3).normal(size=(3, 50)).astype(np.float32)
    tensor, body = to_wire(mx.array(array), coding, kind)
    data = bytes(body)
    scales = np.frombuffer(data, "<f4", 3)
    raw = np.frombuffer(data, np.uint8, offset=12).reshape(3, 50)
    table = np.array([e4m3(byte) for byte in range(256)])
    values = table[raw] if coding == "fp8" else raw.view(np.int8).astype(float)
    read = (values * scales[:, None]).astype(np.float32)
    for reader in installed_kinds():
        np.testing.assert_array_equal(read, as_f32(from_wire(tensor, data, reader)))
    assert np.abs(values).max() == (448 if coding == "fp8" else 127)
    assert np.abs(read - array).max() < np.abs(array).max() / 16


def test_every_fp8_is_read_as_the_format_says(kind: str) -> None:
    body = np.array([1], "<f4").tobytes() + bytes(range(256))
    read = as_f32(from_wire(Tensor("f32", (1, 256), "fp8"), body, kind))[0]
    np.testing.assert_array_equal(read, [e4m3(byte) for byte in range(256)])
