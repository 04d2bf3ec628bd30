"""Products on several cores give the very numbers that one core gives."""

import mlx.core as mx
import mlx.nn as nn
import pytest

from pxd.executors.mlx.lanes import ALIGNED, LEAST_PART, make_lanes, widen

LANES = (make_lanes()[0], mx.new_stream(mx.cpu), mx.new_stream(mx.cpu))
ROWS = (1, 2, 3, 8, 17, 64)
SHAPES = ((256, 512), (320, 1000), (768, 2048), (1024, 96))


class Both(nn.Module):
    """A matrix twice, of which only one is divided."""

    def __init__(self, plain: nn.Module, wide: nn.Module) -> None:
        super().__init__()
        self.plain, self.wide = plain, wide
        wide.update(plain.parameters())
        widen(wide, LANES)
        assert type(wide) is not type(plain)


def same(one: mx.array, other: mx.array) -> bool:
    return one.dtype == other.dtype and bool(mx.array_equal(one, other).item())


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16, mx.float16])
@pytest.mark.parametrize(("inputs", "outputs"), SHAPES)
@pytest.mark.parametrize("bias", [False, True])
def test_linear(dtype: mx.Dtype, inputs: int, outputs: int, bias: bool) -> None:
    plain, wide = nn.Linear(inputs, outputs, bias), nn.Linear(inputs, outputs, bias)
    plain.set_dtype(dtype)
    both = Both(plain, wide)
    for rows in ROWS:
        x = mx.random.normal((1, rows, inputs)).astype(dtype)
        assert same(both.wide(x), both.plain(x)), rows


@pytest.mark.parametrize(("bits", "mode"), [(4, "affine"), (8, "affine"), (4, "mxfp4")])
@pytest.mark.parametrize("bias", [False, True])
def test_quantised_linear(bits: int, mode: str, bias: bool) -> None:
    group = 32 if mode == "mxfp4" else 64

    def make() -> nn.Module:
        return nn.QuantizedLinear(768, 1000, bias, group, bits, mode=mode)

    both = Both(make(), make())
    for rows in ROWS:
        x = mx.random.normal((rows, 768))
        assert same(both.wide(x), both.plain(x)), rows


def test_embeddings_as_the_head() -> None:
    plain, quantised = nn.Embedding(3000, 256), nn.QuantizedEmbedding(3000, 256)
    both = Both(plain, nn.Embedding(3000, 256))
    packed = Both(quantised, nn.QuantizedEmbedding(3000, 256))
    for rows in ROWS:
        x = mx.random.normal((rows, 256))
        assert same(both.wide.as_linear(x), both.plain.as_linear(x))
        assert same(packed.wide.as_linear(x), packed.plain.as_linear(x))
    tokens = mx.array([[5, 2999, 0]])
    assert same(both.wide(tokens), both.plain(tokens))


def test_small_products_stay_whole() -> None:
    module = nn.Linear(64, 2 * ALIGNED - 1)
    widen(module, LANES[:2])
    assert type(module) is nn.Linear
    module = nn.Linear(64, 128)
    widen(module, LANES[:2])
    least = 2 * LEAST_PART // (64 * 128)
    assert not module._parts.pay(mx.zeros((1, least - 1, 64)))
    assert module._parts.pay(mx.zeros((1, least, 64)))


def test_nothing_is_copied_and_no_parameter_added() -> None:
    module = nn.Linear(1024, 4096)
    names = set(module.parameters())
    mx.eval(module.parameters())
    x = mx.random.normal((1, 1024))
    mx.eval(x)
    before = mx.get_active_memory()
    widen(module, LANES[:2])
    mx.eval(module(x))
    assert mx.get_active_memory() - before < 1 << 20
    assert set(module.parameters()) == names
