"""The models that are measured: the bundled one, and larger ones with random weights.

Larger ones are of qwen2's form, the one that `mlx_lm` can pipeline, with as many weights per layer
as the model that they are named after. They use the bundled model's tokenizer, whose ids are the
first of a larger vocabulary. No answer ever ends by itself and each token is visible text, since
only letters, digits and words have more than a trace of an output row.
"""

import json
import os
import random
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

DEMO = Path(__file__).resolve().parents[2] / "pxd" / "models" / "demo"
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
MAKE_TIMEOUT_S = 600.0
TRACE = 0.01
TEMPLATE_TOKENS = 3
"""What the chat template adds to a prompt: a mark before it, one behind it, one for the answer."""


@dataclass(frozen=True)
class Shape:
    """`config` overrides what all shapes have; without it the bundled model is meant."""

    name: str
    layers: int
    hidden_size: int
    dtype: str
    config: dict[str, Any] | None = None


SHAPES = {
    "tiny": Shape("tiny", 8, 128, "float32"),
    "100m": Shape(
        "100m",
        12,
        768,
        "float32",
        {
            "vocab_size": 32000,
            "intermediate_size": 2048,
            "num_attention_heads": 12,
            "num_key_value_heads": 4,
        },
    ),
    "0.6b": Shape(
        "0.6b",
        28,
        1024,
        "float32",
        {
            "vocab_size": 151936,
            "intermediate_size": 4096,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
        },
    ),
}


def model(name: str, directory: Path, dtype: str = "") -> Path:
    """The directory of a model below `directory`; it is made unless it is there already."""
    shape = SHAPES[name]
    dtype = dtype or shape.dtype
    made = directory / f"{name}-{dtype}"
    if not (made / "config.json").exists():
        command = [sys.executable, "-m", "scripts.benchmarks.models", name, str(made), dtype]
        subprocess.run(command, check=True, timeout=MAKE_TIMEOUT_S)
    return made


def prompt(tokens: int, seed: str) -> str:
    """Text of exactly `tokens` tokens, the chat template's included; equal for equal seeds."""
    rng = random.Random(seed)
    return "".join(rng.choice("0123456789") for _ in range(tokens - TEMPLATE_TOKENS))


def make(shape: Shape, directory: Path, dtype: str) -> None:
    """Write the model into `directory`, which shows up only when it is complete."""
    import mlx.core as mx

    partial = directory.with_name(f"{directory.name}.{os.getpid()}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name in TOKENIZER_FILES:
        shutil.copy(DEMO / name, partial / name)
    settings = _config(shape, dtype)
    weights = _random(settings) if shape.config else _bundled()
    weights = {name: value.astype(getattr(mx, dtype)) for name, value in weights.items()}
    file = "model-00001-of-00001.safetensors"
    mx.save_safetensors(str(partial / file), weights, metadata={"format": "mlx"})
    index = {
        "metadata": {"total_size": sum(value.nbytes for value in weights.values())},
        "weight_map": dict.fromkeys(weights, file),
    }
    (partial / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "config.json").write_text(json.dumps(settings, indent=1))
    shutil.rmtree(directory, ignore_errors=True)
    partial.rename(directory)


def _config(shape: Shape, dtype: str) -> dict[str, Any]:
    found: dict[str, Any] = msgspec.json.decode((DEMO / "config.json").read_bytes())
    if shape.config:
        found |= {
            "architectures": ["Qwen2ForCausalLM"],
            "model_type": "qwen2",
            "hidden_size": shape.hidden_size,
            "num_hidden_layers": shape.layers,
            "max_position_embeddings": 8192,
            **shape.config,
        }
        del found["head_dim"]
    return found | {"torch_dtype": dtype}


def _random(settings: dict[str, Any]) -> dict[str, Any]:
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models.qwen2 import Model, ModelArgs

    mx.random.seed(0)
    net = Model(ModelArgs.from_dict(settings))
    weights = dict(tree_flatten(net.parameters()))
    for name, value in weights.items():
        if value.ndim > 1:
            weights[name] = mx.random.normal(value.shape) * value.shape[-1] ** -0.5
    return _visible(weights)


def _bundled() -> dict[str, Any]:
    import mlx.core as mx

    weights: dict[str, Any] = mx.load(str(DEMO / "model.safetensors"))  # type: ignore[assignment]
    return _visible(weights)


def _visible(weights: dict[str, Any]) -> dict[str, Any]:
    """Leave no more than a trace of the rows of tokens that are not to be drawn."""
    import mlx.core as mx

    name = "model.embed_tokens.weight"
    rows = weights[name].shape[0]
    kept = _drawable()
    drawn = mx.array([1.0 if token in kept else TRACE for token in range(rows)])
    weights[name] = weights[name].astype(mx.float32) * drawn[:, None]
    return weights


def _drawable() -> frozenset[int]:
    vocabulary = json.loads((DEMO / "tokenizer.json").read_text())["model"]["vocab"]
    words = {text.removeprefix("Ġ"): token for text, token in vocabulary.items()}
    return frozenset(t for text, t in words.items() if text.isascii() and text.isalnum())


if __name__ == "__main__":
    make(SHAPES[sys.argv[1]], Path(sys.argv[2]), sys.argv[3])
