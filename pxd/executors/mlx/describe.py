"""Describes a model for planning: what its files say, and the dry run of its skeleton."""

from pathlib import Path

import mlx.core as mx
import mlx.nn as nn

from pxd.executors.mlx.carry import columns
from pxd.executors.mlx.layers import CannotSplit
from pxd.executors.mlx.skeleton import make_skeleton
from pxd.executors.mlx.split import SplitPlan, plan_split
from pxd.executors.mlx.stage import vocabulary_of
from pxd.executors.protocol import ExecutorError, ModelDescription
from pxd.models.config import CONTEXT_NAMES
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError

DRY_RUN_BYTES = 4  # a skeleton's numbers are float32
DEFAULT_CONTEXT = 4096


def describe(path: Path) -> ModelDescription:
    """Describe the model in `path`, whose weights may still be missing.

    Raises `ExecutorError` where mlx-lm could not load it at all.
    """
    try:
        checkpoint = describe_checkpoint(path)
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    model = make_skeleton(path)
    try:
        plan = _plan(model, checkpoint)
    except (RuntimeError, ValueError, TypeError, NotImplementedError) as error:
        raise ExecutorError(
            f"{checkpoint.architecture} models do not run on this machine: {error}"
        ) from error
    return ModelDescription(
        architecture=checkpoint.architecture,
        layers=checkpoint.layers,
        hidden_size=plan.hidden_size + _carried_at_most(plan, checkpoint),
        vocabulary=plan.vocabulary,
        context=checkpoint.context or _context_of_code(model),
        layer_bytes=checkpoint.layer_bytes,
        embedding_bytes=checkpoint.embedding_bytes,
        head_bytes=checkpoint.head_bytes,
        tied=checkpoint.tied,
        kv_bytes_per_token=_kv_bytes(plan, checkpoint),
        splits=plan.splits,
        eos=checkpoint.eos,
        fingerprint=checkpoint.fingerprint,
        unsupported=plan.reason,
    )


def _plan(model: nn.Module, checkpoint: Checkpoint) -> SplitPlan:
    try:
        plan = plan_split(model)
        if plan.layers != checkpoint.layers:
            raise CannotSplit(
                f"its code has {plan.layers} layers, its configuration {checkpoint.layers}"
            )
    except CannotSplit as error:
        return SplitPlan(
            layers=checkpoint.layers,
            hidden_size=checkpoint.hidden_size or 0,
            vocabulary=vocabulary_of(model),
            splits=(),
            reason=f"{checkpoint.architecture} cannot be split: {error}",
        )
    return plan


def _carried_at_most(plan: SplitPlan, checkpoint: Checkpoint) -> int:
    dtype = getattr(mx, checkpoint.dtype)
    return max((columns(carried, dtype) for carried in plan.carried.values()), default=0)


def _context_of_code(model: nn.Module) -> int:
    """What mlx-lm takes for the longest sequence where the configuration does not say."""
    for module in model.modules():
        for name in CONTEXT_NAMES:
            value = getattr(getattr(module, "args", None), name, None)
            if isinstance(value, int) and value > 0:
                return value
    return DEFAULT_CONTEXT


def _kv_bytes(plan: SplitPlan, checkpoint: Checkpoint) -> tuple[int, ...]:
    """Per layer; a cache that several layers share counts with the first of them."""
    item_bytes = getattr(mx, checkpoint.dtype).size
    per_layer = [0] * plan.layers
    counted: set[int] = set()
    for layer in sorted(plan.cache_of):
        place = plan.cache_of[layer]
        if place not in counted:
            counted.add(place)
            per_layer[layer] = plan.token_bytes[place] * item_bytes // DRY_RUN_BYTES
    return tuple(per_layer)
