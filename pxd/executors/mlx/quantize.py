"""Makes a quantised copy of a model, as `mlx_lm.convert` does, matrix by matrix.

That one says nothing until a shard is done, which takes minutes on a CPU.
"""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map, tree_map_with_path
from mlx_lm.convert import MODEL_CONVERSION_DTYPES
from mlx_lm.utils import get_total_parameters, load, make_shards, quantize_model, save_config

from pxd.executors.protocol import ExecutorError, Progress
from pxd.models.describe import INDEX_NAME
from pxd.models.errors import NoRoom
from pxd.models.kept import check_room

NICENESS = 10
"""Requests that run beside it go first."""


def quantize(source: Path, target: Path, bits: int, progress: Progress) -> None:
    """Write the model in `source` with `bits` for each weight into the new directory `target`.

    In memory is no more at a time than one shard of the result (5 GiB) and the matrix at work.
    `progress` gets what part is done, 0 to 1. Raises `ExecutorError`, and leaves the rest then.
    """
    os.nice(NICENESS)
    try:
        model, tokenizer, config = load(
            str(source),
            return_config=True,
            lazy=True,
            tokenizer_config={"trust_remote_code": False},
        )
    except (ValueError, KeyError, TypeError) as error:
        raise ExecutorError(f"mlx-lm cannot convert {source}: {error}") from error
    _cast(model, config)
    model, config = quantize_model(model, config, None, bits)
    if not any(name.endswith(".scales") for name, _ in tree_flatten(model.parameters())):
        raise ExecutorError(
            f"no matrix of {source} can be quantised: MLX takes rows in groups of 64"
        )
    target.mkdir(parents=True)
    try:
        _save_weights(target, model, progress)
    except NoRoom as error:
        raise ExecutorError(str(error)) from error
    sees = "vision_tower" in getattr(model, "model", {})
    save_config(config, target / "config.json", keep_vision_config=sees)
    tokenizer.save_pretrained(target)
    if (generation := source / "generation_config.json").is_file():
        shutil.copy(generation, target)


def _cast(model: nn.Module, config: dict[str, Any]) -> None:
    """To the type that the configuration names, where it names one."""
    name = config.get("torch_dtype") or config.get("text_config", {}).get("dtype")
    if name not in MODEL_CONVERSION_DTYPES:
        return
    dtype, wanted = getattr(mx, name), getattr(model, "cast_predicate", lambda _: True)

    def cast(path: str, value: mx.array) -> mx.array:
        floating = mx.issubdtype(value.dtype, mx.floating)
        return value.astype(dtype) if floating and wanted(path) else value

    model.update(tree_map_with_path(cast, model.parameters()))


def _save_weights(target: Path, model: nn.Module, progress: Progress) -> None:
    """As `mlx_lm.utils.save_model` does. Raises `NoRoom`."""
    weights = dict(tree_flatten(model.parameters()))
    total, done = sum(value.nbytes for value in weights.values()), 0
    metadata = {"total_size": total, "total_parameters": get_total_parameters(model)}
    check_room(target, total)
    shards = make_shards(weights)
    count, places = len(shards), {}
    # What is written must be held by nobody else, or it stays in memory.
    model.update(tree_map(lambda _: mx.array([]), model.parameters()))
    weights.clear()
    for number in range(1, count + 1):
        shard = shards.pop(0)
        file = f"model-{number:05}-of-{count:05}.safetensors" if count > 1 else "model.safetensors"
        for value in shard.values():
            mx.eval(value)
            done += value.nbytes
            progress(done / total)
        _write(target / file, shard)
        places.update(dict.fromkeys(shard, file))
        del shard
    index = {"metadata": metadata, "weight_map": dict(sorted(places.items()))}
    (target / INDEX_NAME).write_text(json.dumps(index, indent=4))


def _write(path: Path, shard: dict[str, mx.array]) -> None:
    try:
        mx.save_safetensors(str(path), shard, metadata={"format": "mlx"})
    except RuntimeError:
        # MLX does not say why it could not write.
        check_room(path.parent, sum(value.nbytes for value in shard.values()))
        raise
