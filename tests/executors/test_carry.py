"""Values that travel as columns of hidden states, and finding them in calls."""

from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from pxd.executors.mlx.carry import Carried, arrays_in, at, columns, layout_of, pack, put, unpack
from pxd.executors.protocol import StepRejected
from pxd.executors.rows import FRAME_BYTES, check_output
from pxd.wire import Row, Step, Tensor

USES = ((1, (1,)),)
VALUES = [
    Carried(USES, (1, 1, 4, 5), 0, 1, None),
    Carried(USES, (3, 1, 1), 1, 2, mx.float32),
    Carried(USES, (1, 2, 1, 3), 0, 2, None),
    Carried(USES, (1, 1), 1, 0, mx.int32),
]
SHAPES = [(2, 6, 4, 5), (3, 2, 6), (2, 2, 6, 3), (6, 2)]


def made(dtype: mx.Dtype) -> list[mx.array]:
    """Numbers with all their digits, over a wide range."""
    arrays = []
    for number, (one, shape) in enumerate(zip(VALUES, SHAPES, strict=True)):
        draws = mx.random.normal(shape, key=mx.random.key(number))
        draws = draws * mx.exp(4 * mx.random.normal(shape, key=mx.random.key(number + 9)))
        arrays.append(draws.astype(one.dtype or dtype))
    return arrays


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_what_is_packed_comes_out_bit_by_bit(dtype: mx.Dtype) -> None:
    hidden = mx.random.normal((2, 6, 8), key=mx.random.key(3)).astype(dtype)
    values = made(dtype)
    packed = pack(hidden, VALUES, values)
    assert packed.dtype == dtype
    assert packed.shape == (2, 6, 8 + columns(VALUES, dtype))
    rest, found = unpack(packed, VALUES, 8)
    for got, wanted in zip([rest, *found], [hidden, *values], strict=True):
        assert (got.dtype, got.shape) == (wanted.dtype, wanted.shape)
        assert mx.array_equal(got, wanted).item()


def test_positions_can_be_packed_apart() -> None:
    """As rows of a batch are that go different ways."""
    values = made(mx.float32)
    packed = pack(mx.zeros((2, 6, 8)), VALUES, values)
    alone, found = unpack(packed[1:, 4:5], VALUES, 8)
    assert alone.shape == (1, 1, 8)
    assert mx.array_equal(found[0], values[0][1:, 4:5]).item()
    assert mx.array_equal(found[1], values[1][:, 1:, 4:5]).item()
    assert mx.array_equal(found[3], values[3][4:5, 1:]).item()


def test_nothing_carried_changes_nothing() -> None:
    hidden = mx.zeros((1, 2, 8))
    assert pack(hidden, [], []) is hidden
    assert unpack(hidden, [], 8)[1] == []


@pytest.mark.parametrize(
    ("shapes", "layout"),
    [
        ([(1, 3, 8), (2, 4, 8), (2, 2, 8)], ((1, 1, 8), 0, 1)),
        ([(5, 1, 3), (5, 2, 4), (5, 2, 2)], ((5, 1, 1), 1, 2)),
        ([(1, 2, 3, 8), (2, 2, 4, 8), (2, 2, 2, 8)], ((1, 2, 1, 8), 0, 2)),
        # All positions so far, as keys and values are.
        ([(1, 2, 3, 8), (2, 2, 4, 8), (2, 2, 6, 8)], None),
        # The same for all positions, or for all of a batch.
        ([(1, 8), (2, 8), (2, 8)], None),
        ([(3, 8), (4, 8), (2, 8)], None),
        # A mask.
        ([(3, 3), (4, 4), (2, 6)], None),
        ([(1, 3, 8), (2, 4, 8), (2, 8)], None),
    ],
)
def test_values_are_known_by_how_their_shapes_change(
    shapes: list[tuple[int, ...]], layout: Any
) -> None:
    assert layout_of(shapes, [(1, 3), (2, 4), (2, 2)]) == layout


class Bundle:
    """As mlx-lm's own code has them."""

    __module__ = "mlx_lm.models.somewhere"

    def __init__(self) -> None:
        self.raw, self.eps = mx.array([1.0]), 1e-5


def test_arrays_are_found_and_replaced_wherever_they_are() -> None:
    a, b, c = (mx.array([float(n)]) for n in range(3))
    bundle = Bundle()
    args, kwargs = [a, None, (b, 7)], {"blocks": bundle, "mask": "causal", "extra": c}
    found = arrays_in(args, kwargs)
    assert list(found) == [(0,), (2, 0), ("blocks", "raw"), ("extra",)]
    assert all(at(path, args, kwargs) is array for path, array in found.items())
    new = {path: mx.array([9.0 + n]) for n, path in enumerate(found)}
    # What the model itself has there may be nothing at all.
    templates = {0: a, 2: (b, 7), "blocks": bundle, "extra": c}
    given, named = put(new, templates, [None] * 3, {"blocks": None, "mask": "causal"})
    assert arrays_in(given, named) == new
    assert (given[1], given[2][1], named["mask"]) == (None, 7, "causal")
    assert named["blocks"].eps == bundle.eps
    np.testing.assert_array_equal(np.array(bundle.raw), [1.0])


def test_steps_whose_output_fits_into_no_frame_are_to_be_smaller() -> None:
    step = Step(
        pipeline="p",
        session=1,
        step=0,
        rows=(Row(1, 0, 1024, 0), Row(2, 9, 1024, 1)),
        tensor=Tensor("i32", (2048,)),
    )
    check_output(step, FRAME_BYTES // 2048)
    with pytest.raises(StepRejected, match="256 MiB that go into one frame") as caught:
        check_output(step, FRAME_BYTES // 2048 + 1)
    assert (caught.value.code, caught.value.requests) == ("out-of-memory", (1, 2))
