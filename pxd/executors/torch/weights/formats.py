"""How a model's weights are quantised, and what this executor makes of it.

Quantised weights are spread out to plain numbers when they are loaded, since PyTorch itself has no
arithmetic for them and the kernels of others are for some GPUs only. Most are read by code of ours;
for the rest transformers does the same.
"""

import importlib.util
import re
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple

import torch

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.weights import bnb, fp8, mlx, packed
from pxd.executors.torch.weights.stored import Stored, Tensors

Spread = Callable[[Tensors, torch.dtype], dict[str, Stored]]

_BY_TRANSFORMERS = frozenset({"mxfp4", "compressed-tensors"})

_UNUSED = re.compile(r"\.(input|output|activation|[kqv])_(scale|zero_point|global_scale)$")


class Quantization(NamedTuple):
    """`spread` makes plain weights of a type of those that are stored so; where it is left to
    transformers it returns what it is given. `typed` says that what is stored tells the type of
    numbers, which else config.json does."""

    spread: Spread
    typed: bool = False


def quantization_of(config: Any) -> Quantization | None:
    """What transformers' `config` says, which then keeps only what transformers is to do.

    Raises `ExecutorError` for a kind that this executor does not read.
    """
    own, theirs = _take(config, "quantization"), _take(config, "quantization_config")
    if own is not None:
        # mlx-lm writes it under both names.
        packings = mlx.Packings(own)
        return Quantization(lambda tensors, _: mlx.dense(tensors, packings), typed=True)
    if theirs is None:
        return None
    method = theirs.get("quant_method")
    if method == "fp8":
        return Quantization(partial(fp8.dense, block=fp8.block_of(theirs)))
    if method in ("gptq", "awq"):
        return Quantization(partial(packed.dense, form=packed.format_of(theirs)))
    if method == "bitsandbytes":
        return Quantization(bnb.dense)
    if method not in _BY_TRANSFORMERS:
        raise ExecutorError(f"it is quantised by {method}, which the torch executor does not read")
    if method == "compressed-tensors" and not importlib.util.find_spec("compressed_tensors"):
        raise ExecutorError(
            "its weights are in a format that needs: pip install compressed-tensors"
        )
    config.quantization_config = {**theirs, "dequantize": True}
    return Quantization(lambda tensors, _: dict(tensors))


def _take(config: Any, name: str) -> Mapping[str, Any] | None:
    for part in (config, config.get_text_config()):
        found = getattr(part, name, None)
        if isinstance(found, dict):
            delattr(part, name)
            return found
    return None


def is_needed(tensor: str) -> bool:
    """Not those of activations and caches, which are not quantised here."""
    return not _UNUSED.search(tensor)
