"""Makes tiny models with random weights, in Hugging Face layout, from real configurations.

    python -m tests.tiny_models ARCHITECTURE DIRECTORY [--dtype float32] [--quantize 4] [--shards 2]

Weights are made by mlx-lm's own model classes. Runs in a process of its own: many architectures
built in one process, one after the other, have been seen to corrupt the heap.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

from pxd.lean import without_torch
from tests.tiny_configs import CONFIGS, VOCABULARY

__all__ = ["VOCABULARY", "make_in_process", "make_tiny_model", "save_tokenizer"]

END = "<|end|>"
CHAT_TEMPLATE = (
    "{% for m in messages %}"
    "{% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}"
    "<|{{ m['role'] }}|>{{ m['content'] }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)

QUANTIZATIONS: dict[str, dict[str, Any]] = {
    "4": {"group_size": 32, "bits": 4},
    "8": {"group_size": 32, "bits": 8},
    "mxfp4": {"group_size": 32, "bits": 4, "mode": "mxfp4"},
}


def make_in_process(
    architecture: str,
    directory: Path,
    *,
    dtype: str = "float32",
    quantize: str = "",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a model in this process; see the module for why `make_tiny_model` is usually better."""
    import mlx.core as mx
    import mlx.nn as nn
    from mlx.utils import tree_flatten, tree_map
    from mlx_lm.utils import _get_classes

    config = {**CONFIGS[architecture], "dtype": dtype}
    model_class, args_class = _get_classes(config)
    mx.random.seed(seed)
    model = model_class(args_class.from_dict(json.loads(json.dumps(config))))
    # Larger than the usual start values: answers must depend on every layer.
    model.update(
        tree_map(
            lambda p: (
                p + 0.3 * mx.random.normal(p.shape)
                if p.ndim > 1 and mx.issubdtype(p.dtype, mx.floating)
                else p
            ),
            model.parameters(),
        )
    )
    model.set_dtype(getattr(mx, dtype))
    if quantize:
        config["quantization"] = QUANTIZATIONS[quantize]
        size = QUANTIZATIONS[quantize]["group_size"]
        nn.quantize(
            model,
            **QUANTIZATIONS[quantize],
            class_predicate=lambda _, m: (
                hasattr(m, "to_quantized")
                and m.weight.shape[-1] % size == 0
                and m.weight.shape[-2] > 1
            ),
        )
    tied = config.get("text_config", config).get("tie_word_embeddings")
    weights = {
        name: value
        for name, value in tree_flatten(model.parameters())
        if not (tied and ".lm_head." in f".{name}")
    }
    directory.mkdir(parents=True, exist_ok=True)
    _save(weights, directory, shards)
    (directory / "config.json").write_text(json.dumps(config))
    save_tokenizer(directory)
    return directory


def _save(weights: dict[str, Any], directory: Path, shards: int) -> None:
    import mlx.core as mx

    if shards == 1:
        mx.save_safetensors(
            str(directory / "model.safetensors"), weights, metadata={"format": "mlx"}
        )
        return
    names = sorted(weights)
    size = -(-len(names) // shards)
    weight_map = {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        part = {name: weights[name] for name in names[shard * size : (shard + 1) * size]}
        mx.save_safetensors(str(directory / file), part, metadata={"format": "mlx"})
        weight_map.update(dict.fromkeys(part, file))
    total = sum(value.nbytes for value in weights.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))


def save_tokenizer(directory: Path) -> None:
    """A tokenizer of single bytes with the special tokens of `CHAT_TEMPLATE`."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    special = ["<|user|>", END, "<|assistant|>", "<|system|>"]
    tokenizer.add_special_tokens([AddedToken(token, special=True) for token in special])
    tokenizer.save(str(directory / "tokenizer.json"))
    tokenizer_config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (directory / "tokenizer_config.json").write_text(json.dumps(tokenizer_config))


def make_tiny_model(
    architecture: str,
    directory: Path,
    *,
    dtype: str = "float32",
    quantize: str = "",
    shards: int = 1,
    seed: int = 0,
) -> Path:
    """Make a model in a process of its own and return `directory`."""
    command = [sys.executable, "-m", "tests.tiny_models", architecture, str(directory)]
    command += ["--dtype", dtype, "--shards", str(shards), "--seed", str(seed)]
    if quantize:
        command += ["--quantize", quantize]
    root = Path(__file__).resolve().parent.parent
    subprocess.run(command, check=True, cwd=root, timeout=300)
    return directory


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("architecture", choices=sorted(CONFIGS))
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--quantize", default="", choices=QUANTIZATIONS)
    parser.add_argument("--shards", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    arguments = vars(parser.parse_args())
    make_in_process(arguments.pop("architecture"), arguments.pop("directory"), **arguments)


if __name__ == "__main__":
    without_torch()
    main()
