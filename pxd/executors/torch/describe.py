"""Describes a model for planning: what its files say, and the dry run of its skeleton."""

from pathlib import Path
from typing import Any

import torch

from pxd.executors.protocol import ExecutorError, ModelDescription
from pxd.executors.torch.kv import token_numbers
from pxd.executors.torch.skeleton import make_skeleton, read_config
from pxd.executors.torch.split import CannotSplit, SplitPlan, plan_split
from pxd.executors.torch.weights.formats import quantization_of
from pxd.models.config import CONTEXT_NAMES
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError

DEFAULT_CONTEXT = 4096


def describe(path: Path) -> ModelDescription:
    """Describe the model in `path`, whose weights may still be missing.

    Raises `ExecutorError` where transformers could not load it, or this executor not run it.
    """
    try:
        checkpoint = describe_checkpoint(path)
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    config = read_config(path)
    quantization_of(config)  # refuses what could not be loaded
    plan = _plan(config, checkpoint)
    item_bytes = getattr(torch, checkpoint.dtype).itemsize
    return ModelDescription(
        architecture=checkpoint.architecture,
        layers=checkpoint.layers,
        hidden_size=plan.hidden_size,
        vocabulary=plan.vocabulary,
        context=checkpoint.context or _context_of(config),
        layer_bytes=checkpoint.layer_bytes,
        embedding_bytes=checkpoint.embedding_bytes,
        head_bytes=checkpoint.head_bytes,
        tied=checkpoint.tied,
        kv_bytes_per_token=tuple(
            token_numbers({layer: plan.shapes[layer]}) * item_bytes for layer in range(plan.layers)
        ),
        splits=plan.splits,
        eos=checkpoint.eos,
        fingerprint=checkpoint.fingerprint,
        unsupported=plan.reason and f"{checkpoint.architecture} cannot be split: {plan.reason}",
    )


def _plan(config: Any, checkpoint: Checkpoint) -> SplitPlan:
    model = make_skeleton(config)
    try:
        plan = plan_split(model, checkpoint.layers)
        if plan.shapes.keys() != set(range(plan.layers)):
            raise CannotSplit("not all of its layers attend")
    except (
        CannotSplit, RuntimeError, ValueError, TypeError, AttributeError, KeyError, IndexError,
    ) as error:  # fmt: skip
        raise ExecutorError(
            f"the torch executor cannot run {checkpoint.architecture} models: {error}"
        ) from error
    return plan


def _context_of(config: Any) -> int:
    """What transformers takes for the longest sequence where the configuration does not say."""
    text = config.get_text_config()
    for name in CONTEXT_NAMES:
        value = getattr(text, name, None)
        if isinstance(value, int) and value > 0:
            return value
    return DEFAULT_CONTEXT
