"""Large matrix products on several cores of a CPU.

MLX runs each stream of a CPU in one thread, and its matrix products on a CPU, too. So their weights
are divided by rows of the result, a part for each of several streams: every number comes from the
same operations as before, in the same order, only sooner. Other operations are left alone, and so
is a GPU.
"""

import functools
import os
from collections.abc import Callable, Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn

MOST = 16
ALIGNED = 32
"""Parts begin at multiples of it, so that no kernel meets another remainder than it would."""

LEAST_PART = 1 << 16
"""Multiplications per part, or handing it to another thread takes longer than it saves."""

WIDTH = "256"
"""MLX hands out operations breadth first as long as no more than so many are ready, 20 by default;
beyond that it goes depth first, which is one stream after the other."""

Product = Callable[[mx.array, mx.Stream], mx.array]


@functools.cache
def make_lanes() -> tuple[mx.Stream, ...]:
    """The streams of the default device that compute side by side, at least one."""
    device = mx.default_device()
    first = mx.default_stream(device)
    if device.type != mx.DeviceType.cpu:
        return (first,)
    # MLX reads it when it first computes.
    os.environ.setdefault("MLX_BFS_MAX_WIDTH", WIDTH)
    return first, *(mx.new_stream(device) for _ in range(min(_cores(), MOST) - 1))


def _cores() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


class _Parts:
    """A matrix of `size` weights as products with parts of it, each for one lane."""

    def __init__(self, products: Sequence[Product], lanes: Sequence[mx.Stream], size: int) -> None:
        self._products = list(zip(products, lanes, strict=False))
        self._least_rows = -(-len(products) * LEAST_PART // size)

    def pay(self, x: mx.array) -> bool:
        """Whether ``(..., inputs)`` has rows enough to be worth dividing the work."""
        return x.size >= self._least_rows * x.shape[-1]

    def __call__(self, x: mx.array) -> mx.array:
        return mx.concatenate([product(x, lane) for product, lane in self._products], axis=-1)


class _WideLinear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return self._parts(x) if self._parts.pay(x) else super().__call__(x)


class _WideQuantizedLinear(nn.QuantizedLinear):
    def __call__(self, x: mx.array) -> mx.array:
        return self._parts(x) if self._parts.pay(x) else super().__call__(x)


class _WideEmbedding(nn.Embedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return self._parts(x) if self._parts.pay(x) else super().as_linear(x)


class _WideQuantizedEmbedding(nn.QuantizedEmbedding):
    def as_linear(self, x: mx.array) -> mx.array:
        return self._parts(x) if self._parts.pay(x) else super().as_linear(x)


_WIDE: dict[type, type] = {
    nn.Linear: _WideLinear,
    nn.QuantizedLinear: _WideQuantizedLinear,
    nn.Embedding: _WideEmbedding,
    nn.QuantizedEmbedding: _WideQuantizedEmbedding,
}


def widen(model: nn.Module, lanes: Sequence[mx.Stream]) -> None:
    """Have the model's matrices multiply in several lanes. No weight is copied."""
    for module in model.modules():
        wide = _WIDE.get(type(module))
        if wide is None:
            continue
        outputs, size = module.weight.shape[0], _size(module)
        count = min(len(lanes), outputs // ALIGNED, max(2, size // LEAST_PART))
        if count < 2:
            continue
        step = -(-outputs // (count * ALIGNED)) * ALIGNED
        products = [_product(module, begin, begin + step) for begin in range(0, outputs, step)]
        module._parts = _Parts(products, lanes, size)
        module.__class__ = wide


def _size(module: Any) -> int:
    """Weights of a matrix, packed or not."""
    packed = getattr(module, "bits", 0)
    return int(module.weight.size * 32 // packed if packed else module.weight.size)


def _product(module: Any, begin: int, end: int) -> Product:
    """What the module's own code computes, for the results [begin, end) of each row.

    Nothing is evaluated, for a stage does not need all that its model has.
    """
    weight = module.weight[begin:end]
    bias = module.get("bias")
    bias = bias[begin:end] if bias is not None else None
    if isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)):
        scales = module.scales[begin:end]
        offsets = module.get("biases")
        offsets = offsets[begin:end] if offsets is not None else None
        packing = {"group_size": module.group_size, "bits": module.bits, "mode": module.mode}

        def quantized(x: mx.array, lane: mx.Stream) -> mx.array:
            y = mx.quantized_matmul(x, weight, scales, offsets, True, **packing, stream=lane)
            return y if bias is None else mx.add(y, bias, stream=lane)

        return quantized
    weight = weight.T

    def plain(x: mx.array, lane: mx.Stream) -> mx.array:
        if bias is None:
            return mx.matmul(x, weight, stream=lane)
        return mx.addmm(bias, x, weight, stream=lane)

    return plain
