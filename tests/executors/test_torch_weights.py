"""Quantised weights on PyTorch: spread out to what their makers mean, or refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pxd.executors.memory import RESERVE
from pxd.executors.protocol import ExecutorError, LoadSpec
from pxd.wire import Sampling
from tests.executors.pipeline import Pipeline

torch = pytest.importorskip("torch")

import mlx.core as mx  # noqa: E402
import numpy as np  # noqa: E402
from safetensors.torch import load_file, save_file  # noqa: E402

from pxd.executors.torch import loader  # noqa: E402
from pxd.executors.torch.describe import describe  # noqa: E402
from pxd.executors.torch.engine import TorchEngine  # noqa: E402
from pxd.executors.torch.weights import bnb, fp8, mlx, packed  # noqa: E402
from tests.tiny_models import make_tiny_model  # noqa: E402
from tests.torch_models import make_torch_model  # noqa: E402

LAYERS = 6
PROMPT = list(range(5, 40))
Tensors = dict[str, Any]


class InMemory:
    """A stored tensor as safetensors shows one."""

    def __init__(self, tensor: Any) -> None:
        self.tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self.tensor.shape)

    def get_dtype(self) -> str:
        return {
            torch.float32: "F32", torch.uint32: "U32", torch.int32: "I32",
            torch.int8: "I8", torch.uint8: "U8",
            torch.float8_e4m3fn: "F8_E4M3",
        }[self.tensor.dtype]  # fmt: skip

    def __getitem__(self, index: Any) -> Any:
        return self.tensor[index]


def stored(tensors: Tensors) -> dict[str, InMemory]:
    return {name: InMemory(tensor) for name, tensor in tensors.items()}


def random(*shape: int, seed: int = 0) -> Any:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def small_numbers(*shape: int, below: int) -> Any:
    source = torch.Generator().manual_seed(1)
    return torch.randint(0, below, shape, generator=source, dtype=torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 6, 8])
@pytest.mark.parametrize("group", [32, 128])
def test_mlx_weights_are_those_of_mlx(
    bits: int, group: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(mlx, "PIECE", 700)  # a few rows at a time
    numbers = mx.random.normal((3, 7, 256), key=mx.random.key(bits))
    parts = mx.quantize(numbers, group_size=group, bits=bits)
    wanted = np.array(mx.dequantize(*parts, group_size=group, bits=bits))
    tensors = [torch.from_numpy(np.array(part)) for part in parts]
    got = mlx.dequantize(*tensors, mlx.Packing(bits, group))
    assert np.array_equal(got.numpy(), wanted)
    # Rounded once, where the stored scales are of a smaller type.
    halves = [tensors[0], tensors[1].bfloat16(), tensors[2].bfloat16()]
    exact = mlx.dequantize(halves[0], *(t.float() for t in halves[1:]), mlx.Packing(bits, group))
    assert torch.equal(mlx.dequantize(*halves, mlx.Packing(bits, group)), exact.bfloat16())


def scores(path: Path, kinds: list[str], cuts: list[int]) -> dict[int, float]:
    """Log probabilities of the likeliest tokens behind the prompt."""
    pipeline = Pipeline.load(path, LAYERS, cuts, kinds=kinds)
    wanted = {1: Sampling(temperature=0, logprobs=20)}
    pipeline.prefill(1, PROMPT, chunk=20, samplings=wanted)
    [drawn] = pipeline.step([(1, len(PROMPT) - 1, PROMPT[-1:], True)])
    return dict(drawn.logprobs.top)


def test_stages_of_either_kind_compute_the_same_of_mlx_weights(tmp_path: Path) -> None:
    path = make_tiny_model("qwen3", tmp_path / "four", quantize="4")
    alone = scores(path, ["mlx"], [])
    assert scores(path, ["mlx", "torch"], [3]) == pytest.approx(alone, abs=1e-3)


def test_experts_of_mlx_lm_are_given_one_by_one_under_the_names_of_makers() -> None:
    numbers = mx.random.normal((2, 3, 64))
    parts = [torch.from_numpy(np.array(p)) for p in mx.quantize(numbers, group_size=32, bits=8)]
    names = ("weight", "scales", "biases")
    wanted = mlx.dequantize(*parts, mlx.Packing(8, 32))
    for module, first in [
        ("l.0.mlp.switch_mlp.up_proj", "l.0.mlp.experts.0.up_proj.weight"),
        ("l.0.mlp.experts.up_proj", "l.0.mlp.experts.0.up_proj.weight"),
        ("l.0.block_sparse_moe.switch_mlp.up_proj", "l.0.block_sparse_moe.experts.0.w3.weight"),
    ]:
        tensors = stored({f"{module}.{name}": p for name, p in zip(names, parts, strict=True)})
        packings = mlx.Packings(
            {"bits": 4, "group_size": 64, module: {"bits": 8, "group_size": 32}}
        )
        made = mlx.one_by_one(mlx.dense(tensors, packings))
        assert list(made) == [first, first.replace("0.up", "1.up").replace("0.w3", "1.w3")]
        for expert, weight in zip(wanted, made.values(), strict=True):
            assert weight.get_shape() == [3, 64]
            assert torch.equal(weight[...], expert)


def save_changed(path: Path, change: Callable[[str, Any], Tensors], said: Any, to: Path) -> Path:
    """The model in `path` with each projection as `change` makes it and `said` of its weights."""
    shutil.copytree(path, to)
    tensors: Tensors = {}
    for name, tensor in load_file(path / "model.safetensors").items():
        module = name.removesuffix(".weight")
        is_projection = module.endswith("_proj")
        tensors |= change(module, tensor) if is_projection else {name: tensor}
    save_file(
        {name: t.clone(memory_format=torch.contiguous_format) for name, t in tensors.items()},
        to / "model.safetensors",
    )
    config = json.loads((path / "config.json").read_text())
    if said:
        config["quantization_config" if "quant_method" in said else "quantization"] = said
    (to / "config.json").write_text(json.dumps(config))
    return to


BLOCK = (48, 32)


def as_fp8(module: str, weight: Any) -> Tensors:
    rows, columns = (-(-size // side) for size, side in zip(weight.shape, BLOCK, strict=True))
    scales = 0.01 + random(rows, columns).abs()
    name = f"{module}.weight"
    return {name: weight.to(torch.float8_e4m3fn), f"{name}_scale_inv": scales}


def as_gptq(module: str, weight: Any) -> Tensors:
    out, size = weight.shape
    order = torch.arange(size, dtype=torch.int32).flip(0) // 32
    return {
        f"{module}.qweight": small_numbers(size // 8, out, below=1 << 31),
        f"{module}.qzeros": small_numbers(size // 32, out // 8, below=1 << 31),
        f"{module}.scales": random(size // 32, out, seed=2) * 0.02,
        f"{module}.g_idx": order,
    }


FP8 = {"quant_method": "fp8", "weight_block_size": list(BLOCK), "activation_scheme": "dynamic"}
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 32, "desc_act": True}


@pytest.mark.parametrize(("change", "said"), [(as_fp8, FP8), (as_gptq, GPTQ)])
def test_a_quantised_model_is_that_of_its_plain_weights(
    tmp_path: Path, change: Any, said: dict[str, Any]
) -> None:
    base = make_torch_model("llama", tmp_path / "base")
    quantised = save_changed(base, change, said, tmp_path / "quantised")

    def plain(module: str, weight: Any) -> Tensors:
        tensors = stored(change(module, weight))
        if said is FP8:
            made = fp8.dense(tensors, torch.float32, block=BLOCK)
        else:
            made = packed.dense(tensors, torch.float32, form=packed.format_of(GPTQ))
        return {name: tensor[...] for name, tensor in made.items()}

    dense = save_changed(base, plain, None, tmp_path / "dense")
    assert scores(quantised, ["torch"], [3]) == pytest.approx(
        scores(dense, ["torch"], []), abs=1e-4
    )


def test_fp8_blocks_at_the_ends_may_be_smaller() -> None:
    weight, scales = random(100, 70).to(torch.float8_e4m3fn), random(3, 3, seed=1)
    got = fp8.dequantize(weight, scales, BLOCK)
    for row, column in [(0, 0), (47, 31), (48, 32), (99, 69)]:
        assert got[row, column] == weight[row, column].float() * scales[row // 48, column // 32]
    with pytest.raises(ExecutorError, match="w_scale_inv is not quantised as"):
        fp8.dense(stored({"w": weight, "w_scale_inv": random(2, 3)}), torch.float32, block=BLOCK)


def test_awq_weights_are_those_of_mlx_lm() -> None:
    from mlx_lm.utils import _transform_awq_weights

    tensors = {
        "m.qweight": small_numbers(64, 4, below=1 << 31),
        "m.qzeros": small_numbers(2, 4, below=1 << 31),
        "m.scales": random(2, 32),
    }
    said = {"quant_method": "awq", "bits": 4, "group_size": 32, "version": "gemm"}
    got = packed.dense(stored(tensors), torch.float32, form=packed.format_of(said))
    of_mlx = {name: mx.array(tensor.numpy()) for name, tensor in tensors.items()}
    of_mlx["m.qweight"], of_mlx["m.qzeros"] = (
        of_mlx[name].view(mx.uint32) for name in ("m.qweight", "m.qzeros")
    )
    theirs, packing = _transform_awq_weights(of_mlx, said)
    parts = [theirs[f"m.{part}"] for part in ("weight", "scales", "biases")]
    wanted = np.array(mx.dequantize(*parts, **packing))
    assert list(got) == ["m.weight"]
    assert np.allclose(got["m.weight"][...].numpy(), wanted, atol=1e-5)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("form", ["gptq", "gptq_v2"])
def test_gptq_weights_follow_their_groups_and_zero_points(bits: int, form: str) -> None:
    size, out, per = 64, 32, 32 // bits
    numbers = small_numbers(size, out, below=1 << bits)
    zeros = small_numbers(2, out, below=1 << bits) | 1  # none is 0
    scales, groups = random(2, out), torch.arange(size, dtype=torch.int32) % 2
    kept = zeros - int(form == "gptq")

    def words(values: Any) -> Any:
        """Rows of numbers in words of 32 bits, the first one lowest."""
        places = torch.arange(per) * bits
        found = (values.long().unflatten(-1, (-1, per)) << places).sum(-1)
        return torch.where(found >= 1 << 31, found - (1 << 32), found).int()

    tensors = {
        "m.qweight": words(numbers.t()).t().contiguous(),
        "m.qzeros": words(kept),
        "m.scales": scales,
        "m.g_idx": groups,
    }
    said = {"quant_method": "gptq", "bits": bits, "group_size": 32, "checkpoint_format": form}
    made = packed.dense(stored(tensors), torch.float32, form=packed.format_of(said))
    chosen = groups.long()
    assert torch.equal(made["m.weight"][...], ((numbers - zeros[chosen]) * scales[chosen]).t())


def test_bitsandbytes_weights_in_blocks_with_scales_in_blocks() -> None:
    state = {"blocksize": 64, "shape": [4, 96], "nested_blocksize": 4, "nested_offset": 0.5}
    numbers, own, nested = random(16), random(256, seed=1), random(2, seed=2)
    halves = small_numbers(4 * 96, below=16)
    scales = small_numbers(6, below=256)
    tensors = {
        "m.weight": (halves[::2] << 4 | halves[1::2]).to(torch.uint8)[:, None],
        "m.weight.absmax": scales.to(torch.uint8),
        "m.weight.quant_map": numbers,
        "m.weight.nested_absmax": nested,
        "m.weight.nested_quant_map": own,
        "m.weight.quant_state.bitsandbytes__nf4": torch.tensor(
            list(json.dumps(state).encode()), dtype=torch.uint8
        ),
    }
    made = bnb.dense(stored(tensors), torch.float32)
    assert list(made) == ["m.weight"]
    got = made["m.weight"][...].flatten()
    for place in (0, 1, 63, 64, 383):
        block = place // 64
        scale = own[scales[block]] * nested[block // 4] + 0.5
        assert got[place] == numbers[halves[place]] * scale
    eight = {"m.weight": small_numbers(4, 8, below=127).to(torch.int8), "m.SCB": random(4)}
    [weight] = bnb.dense(stored(eight), torch.float32).values()
    wanted = eight["m.weight"].float() * eight["m.SCB"][:, None] / 127
    assert torch.allclose(weight[...], wanted)


@pytest.mark.parametrize(
    ("said", "reason"),
    [
        ({"quant_method": "quark"}, "quantised by quark, which"),
        ({"quant_method": "awq", "bits": 4, "version": "gemv"}, "form gemv"),
        ({"quant_method": "gptq", "bits": 3}, "in 3 bits"),
        ({"quant_method": "fp8", "weight_block_size": [0, 1]}, "weight_block_size"),
        ({"mode": "mxfp4", "bits": 4, "group_size": 32}, "mode mxfp4, which only the mlx executor"),
        ({"bits": 4, "group_size": 48}, "no quantisation of 4 bits in groups of 48"),
    ],
)
def test_other_kinds_are_refused_before_anything_is_read(
    tmp_path: Path, said: dict[str, Any], reason: str
) -> None:
    base = make_torch_model("llama", tmp_path / "base")
    path = save_changed(base, lambda module, t: {f"{module}.weight": t}, said, tmp_path / "m")
    for look in (lambda: describe(path), lambda: load(path)):
        with pytest.raises(ExecutorError, match=reason):
            look()


def load(path: Path) -> Any:
    return TorchEngine().load(LoadSpec(path=str(path), start=0, end=LAYERS), lambda _: None)


def test_what_belongs_to_quantised_weights_is_not_left_out(tmp_path: Path) -> None:
    base = make_torch_model("llama", tmp_path / "base")
    unused = {"input_scale": random(1)}

    def also(module: str, weight: Any) -> Tensors:
        return {**as_fp8(module, weight), **{f"{module}.{n}": t for n, t in unused.items()}}

    load(save_changed(base, also, FP8, tmp_path / "known"))
    unused["smoothing"] = random(1)
    with pytest.raises(ExecutorError, match=r"what is not known: .*smoothing"):
        load(save_changed(base, also, FP8, tmp_path / "unknown"))


def test_what_weights_take_spread_out_is_what_has_to_fit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base = make_torch_model("llama", tmp_path / "base")
    path = save_changed(base, as_fp8, FP8, tmp_path / "m")
    of_files = sum(describe(path).layer_bytes)
    monkeypatch.setattr(loader, "free_memory", lambda _: 1 << 40)
    taken = load(path).weight_bytes
    assert taken > 3 * of_files  # numbers of 32 bits instead of 8
    monkeypatch.setattr(loader, "free_memory", lambda _: taken - 4096 + RESERVE)
    with pytest.raises(ExecutorError, match="these layers take"):
        load(path)
