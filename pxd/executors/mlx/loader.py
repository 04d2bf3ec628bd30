"""Loads a stage through mlx-lm's own loader, so that every checkpoint format it knows works here.

All files are opened, lazily; only tensors of the own layers, and what the ends of the model turn
out to need, ever take memory.
"""

import gc
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.utils import load_model

from pxd.executors.mlx.lanes import make_lanes, widen
from pxd.executors.mlx.layers import CannotSplit
from pxd.executors.mlx.skeleton import model_classes
from pxd.executors.mlx.split import SplitPlan, plan_split
from pxd.executors.mlx.stage import PartialModel, Stage, WholeModel, vocabulary_of
from pxd.executors.mlx.trial import dummy_inputs
from pxd.executors.protocol import ExecutorError, Progress
from pxd.models.describe import Checkpoint

Weights = dict[str, mx.array]
LISTED_NAMES = 5
WARM_UP_TOKENS = 2
ARRAYS_AT_A_TIME = 16


@dataclass(frozen=True)
class LoadedStage:
    """`weight_bytes` is what stays in memory; `dtype` is that of most weights."""

    stage: Stage
    weight_bytes: int
    dtype: mx.Dtype


def load_stage(
    directory: Path, checkpoint: Checkpoint, start: int, end: int, progress: Progress
) -> LoadedStage:
    """Load layers [start, end). Raises `ExecutorError`, also for a range that may not be cut."""
    # What is garbage already must not be freed in between and be taken off.
    gc.collect()
    before = mx.get_active_memory()
    loading = _Loading(checkpoint, start, end)
    model, _ = load_model(
        directory, lazy=True, strict=False, get_model_classes=loading.model_classes
    )
    widen(model, make_lanes())
    stage = loading.stage
    if isinstance(stage, PartialModel):
        stage.tap()
        own = [layer.parameters() for layer in stage.own_layers]
    else:
        own = model.parameters()
    _bring_in([array for _, array in tree_flatten(own)], progress)
    _warm_up(stage, loading)
    mx.clear_cache()
    progress(1.0)
    return LoadedStage(stage, mx.get_active_memory() - before, loading.dtype)


def _bring_in(arrays: list[mx.array], progress: Progress) -> None:
    """Read and convert arrays, a few at a time. Reports up to 0.99: the ends are still to come."""
    total = sum(array.nbytes for array in arrays) or 1
    done = 0
    for begin in range(0, len(arrays), ARRAYS_AT_A_TIME):
        group = arrays[begin : begin + ARRAYS_AT_A_TIME]
        mx.eval(group)
        done += sum(array.nbytes for array in group)
        progress(0.99 * done / total)


class _Loading:
    """Takes part in one `load_model` when it makes the model and when it assigns weights."""

    stage: Stage

    def __init__(self, checkpoint: Checkpoint, start: int, end: int) -> None:
        self.checkpoint, self.start, self.end = checkpoint, start, end
        self.absent: list[str] = []
        self.dtype: mx.Dtype = getattr(mx, checkpoint.dtype)

    def model_classes(self, config: dict[str, Any]) -> tuple[Callable[..., nn.Module], Any]:
        model_class, args_class = model_classes(config)

        def make(args: Any) -> nn.Module:
            model = model_class(args)
            # Some models remember what they first computed from their weights, and those are not
            # loaded yet: what tries the model out gets one of its own.
            self._prepare(model, model_class(args))
            return model

        return make, args_class

    def _prepare(self, model: nn.Module, trial: nn.Module) -> None:
        if not 0 <= self.start < self.end <= self.checkpoint.layers:
            raise ExecutorError(
                f"there are no layers [{self.start}, {self.end}) "
                f"in a model of {self.checkpoint.layers}"
            )
        whole = self.start == 0 and self.end == self.checkpoint.layers
        if whole:
            hidden_size, vocabulary = self.checkpoint.hidden_size or 0, vocabulary_of(trial)
            self.stage = WholeModel(model, self.checkpoint.layers, hidden_size, vocabulary)
            self._own_prefixes: tuple[str, ...] = ("",)
        else:
            self._prepare_part(model, trial)
        self._hook(model)

    def _prepare_part(self, model: nn.Module, trial: nn.Module) -> None:
        try:
            plan = plan_split(trial)
        except CannotSplit as error:
            raise ExecutorError(
                f"{self.checkpoint.architecture} cannot be split: {error}"
            ) from error
        _check_cuts(plan, self.checkpoint.architecture, self.start, self.end)
        self.stage = PartialModel(model, plan, self.start, self.end)
        prefix = self.stage.layer_prefix
        self._own_prefixes = tuple(f"{prefix}{i}." for i in range(self.start, self.end))

    def _hook(self, model: nn.Module) -> None:
        sanitize = getattr(model, "sanitize", None)
        load_weights = model.load_weights

        def sanitize_own(weights: Weights) -> Weights:
            kept = {name: value for name, value in weights.items() if not self._is_partial(name)}
            return self._only_own(sanitize(kept) if sanitize else kept)

        def load_own_weights(weights: list[tuple[str, mx.array]], strict: bool = True) -> nn.Module:
            fills = self._check(model, dict(weights))
            return load_weights([*weights, *fills], strict=strict)

        # Past the module tree: nn.Module would take a plain assignment for a parameter.
        object.__setattr__(model, "sanitize", sanitize_own)
        object.__setattr__(model, "load_weights", load_own_weights)

    def _is_partial(self, name: str) -> bool:
        """Whether a tensor is a hole, or belongs to a foreign layer in a directory with gaps.

        Such a layer may lack tensors, and sanitizing code relies on all being there.
        """
        layer = self.checkpoint.layer_of(name)
        gaps = bool(self.checkpoint.missing or self.checkpoint.absent)
        foreign = layer is not None and not (self.start <= layer < self.end)
        return (gaps and foreign) or name in self.checkpoint.absent

    def _only_own(self, weights: Weights) -> Weights:
        if not isinstance(self.stage, PartialModel):
            return weights
        prefix = self.stage.layer_prefix
        return {
            name: value
            for name, value in weights.items()
            if not name.startswith(prefix) or name.startswith(self._own_prefixes)
        }

    def _check(self, model: nn.Module, weights: Weights) -> list[tuple[str, mx.array]]:
        """Compare the checkpoint with the model; returns what to put where it has nothing.

        Only the ends of the model may be incomplete, since a stage need not have them. They get
        NaN: if they are needed after all, the warm-up shows it.
        """
        expected = dict(tree_flatten(model.parameters()))
        wrong = [
            name
            for name, value in expected.items()
            if name in weights and weights[name].shape != value.shape
        ]
        if wrong:
            raise ExecutorError(f"tensors of the wrong shape: {_listed(wrong)}")
        lacking = [name for name in expected if name not in weights]
        needed = [name for name in lacking if name.startswith(self._own_prefixes)]
        if needed:
            raise ExecutorError(f"the checkpoint lacks {_listed(needed)}")
        kinds = Counter(
            value.dtype
            for name, value in weights.items()
            if name in expected and mx.issubdtype(value.dtype, mx.floating)
        )
        if kinds:
            self.dtype = kinds.most_common(1)[0][0]
        self.absent = lacking
        return [
            (name, mx.full(expected[name].shape, math.nan, self.dtype))
            for name in lacking
            if mx.issubdtype(expected[name].dtype, mx.floating)
        ]


def _check_cuts(plan: SplitPlan, architecture: str, start: int, end: int) -> None:
    for cut in (start, end):
        if 0 < cut < plan.layers and cut not in plan.splits:
            allowed = ", ".join(map(str, plan.splits)) or "nowhere"
            raise ExecutorError(
                f"{architecture} cannot be cut before layer {cut}; allowed: {allowed}"
            )


def _listed(names: list[str]) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(sorted(names)[:LISTED_NAMES]) + more


def _warm_up(stage: Stage, loading: _Loading) -> None:
    """Run two positions once: brings in whatever of the model's ends this stage uses."""
    caches = stage.make_caches()
    output = stage.forward(dummy_inputs(stage, 1, WARM_UP_TOKENS, loading.dtype), caches)[:, -1:]
    mx.eval(output, [cache.state for cache in caches])
    if loading.absent and not mx.isfinite(output).all().item():
        raise ExecutorError(f"the checkpoint lacks {_listed(loading.absent)}")
