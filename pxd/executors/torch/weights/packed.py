"""Weights as GPTQ and AWQ store them: packed by columns, with zero points that are packed, too.

A weight is its group's scale times the difference of a small number and the group's zero point.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.weights.stored import (
    Computed,
    Stored,
    Tensors,
    check,
    part_of,
    spread_modules,
)

_BITS = (2, 4, 8)
_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)
"""Where AWQ's kernels want the eight numbers of a word."""


class Format(NamedTuple):
    """`awq` packs columns into words, GPTQ rows. What is added to stored zero points is `add`."""

    awq: bool
    bits: int
    group: int
    add: int


def format_of(config: Mapping[str, Any]) -> Format:
    """Raises `ExecutorError` for a form of it that this executor does not read."""
    awq = config["quant_method"] == "awq"
    bits, group = config.get("bits", config.get("w_bit")), config.get("group_size", 128)
    form = config.get("version", "gemm") if awq else config.get("checkpoint_format", "gptq")
    form = str(form).lower()
    if form not in (("gemm",) if awq else ("gptq", "gptq_v2")):
        raise ExecutorError(f"it is quantised in the form {form}, which torch does not read")
    if (
        bits not in ((4,) if awq else _BITS)
        or not isinstance(group, int)
        or group < -1
        or not group
    ):
        raise ExecutorError(
            f"it is quantised in {bits} bits, which the torch executor does not read"
        )
    # The first GPTQ files have zero points that are one too small.
    return Format(awq, bits, group, add=int(not awq and form == "gptq"))


def dequantize(
    packed: torch.Tensor,
    zeros: torch.Tensor,
    scales: torch.Tensor,
    groups: torch.Tensor | None = None,
    *,
    form: Format,
) -> torch.Tensor:
    """``(out, in)`` in float32. `groups` ``(in,)`` says which group each input belongs to."""
    zeros = (_columns(zeros, form) + form.add) & ((1 << form.bits) - 1)
    numbers = _columns(packed, form) if form.awq else _columns(packed.t(), form).t()
    if groups is None:
        groups = torch.arange(len(numbers)) // (form.group if form.group > 0 else len(numbers))
    groups = groups.long()
    return ((numbers - zeros[groups]).float() * scales.float()[groups]).t().contiguous()


def _columns(packed: torch.Tensor, form: Format) -> torch.Tensor:
    """Small numbers ``(rows, n)`` from words ``(rows, words)``."""
    count = 32 // form.bits
    places = torch.tensor(_ORDER if form.awq else range(count))
    return ((packed[..., None] >> places * form.bits) & ((1 << form.bits) - 1)).flatten(-2)


def dense(tensors: Tensors, dtype: torch.dtype, *, form: Format) -> dict[str, Stored]:
    """The same weights, not quantised. Raises `ExecutorError` where parts do not fit."""
    return spread_modules(
        tensors,
        ("qweight", "qzeros", "scales", "g_idx"),
        "qweight",
        lambda module: _spread_out(module, tensors, form, dtype),
    )


def _spread_out(module: str, tensors: Tensors, form: Format, dtype: torch.dtype) -> Computed:
    packed, zeros, scales = (
        part_of(tensors, f"{module}.{part}") for part in ("qweight", "qzeros", "scales")
    )
    count = 32 // form.bits
    rows, columns = packed.get_shape()
    size, out = (rows, columns * count) if form.awq else (rows * count, columns)
    groups = scales.get_shape()[0]
    check(packed.get_dtype() == zeros.get_dtype() == "I32", f"{module}.qweight")
    wanted = 1 if form.group == -1 else -(-size // form.group)
    check(scales.get_shape() == [groups, out] and groups == wanted, f"{module}.scales")
    check(zeros.get_shape() == [groups, out // count], f"{module}.qzeros")
    parts: tuple[Stored, ...] = packed, zeros, scales
    order = tensors.get(f"{module}.g_idx")
    if order is not None:
        check(order.get_shape() == [size] and order.get_dtype() == "I32", f"{module}.g_idx")
        parts = *parts, order
    return Computed(parts, [out, size], dtype, partial(dequantize, form=form))
