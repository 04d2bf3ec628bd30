"""Loads a stage of a model directory into SGLang."""

import tempfile
from pathlib import Path

import torch

from pxd.executors.checkpoints import read_checkpoint
from pxd.executors.memory import ADVICE, check_fits, compare, stage_bytes
from pxd.executors.protocol import ExecutorError, LoadSpec, Progress
from pxd.executors.scratch import own_directory
from pxd.executors.sglang.models import architecture_of, find_code, models_directory, only
from pxd.executors.sglang.pinned import check_symbols
from pxd.executors.sglang.ranks import NodeStage, load_ranks
from pxd.executors.sglang.runtime import RankSpec, choose_device
from pxd.executors.sglang.view import make_view
from pxd.executors.torch.device import free_memory
from pxd.models.config import read_json
from pxd.models.describe import Checkpoint
from pxd.models.errors import ModelError

DEFAULT_KV_TOKENS = 16_384
"""Where nobody says how much memory there is for them."""


def load(spec: LoadSpec, progress: Progress) -> NodeStage:
    """Load layers [start, end). Raises `ExecutorError`, also for a range that may not be cut.

    SGLang does not tell how far it is: `progress` is told of the beginning and the end.
    """
    progress(0.0)
    checkpoint = read_checkpoint(spec)
    source = Path(spec.path)
    architecture = _prepare(source, checkpoint, spec)
    check_symbols()
    device = torch.device(choose_device(spec.tensor_parallel))
    computed = stage_bytes(checkpoint, spec.start, spec.end)
    # Ranks have equal shares, on GPUs that are mostly alike.
    check_fits(-(-computed // spec.tensor_parallel), free_memory(device), ADVICE)
    try:
        with tempfile.TemporaryDirectory(dir=own_directory()) as view:
            make_view(source, Path(view), checkpoint, spec.start, spec.end, architecture)
            stage = load_ranks(_rank_spec(spec, checkpoint, view))
    except (
        RuntimeError, ValueError, KeyError, TypeError, OSError, AttributeError, ImportError,
        AssertionError, NotImplementedError,
    ) as error:  # fmt: skip
        raise ExecutorError(
            f"cannot load layers [{spec.start}, {spec.end}) of {spec.path}: "
            f"{type(error).__name__}: {error}"
        ) from error
    compare(computed, stage.weight_bytes)
    progress(1.0)
    return stage


def _prepare(source: Path, checkpoint: Checkpoint, spec: LoadSpec) -> str:
    """The model's architecture, to which SGLang's imports are narrowed. Raises `ExecutorError`."""
    if not 0 <= spec.start < spec.end <= checkpoint.layers:
        raise ExecutorError(
            f"there are no layers [{spec.start}, {spec.end}) in a model of {checkpoint.layers}"
        )
    architecture, module, staged = code_of(source)
    only(module, models_directory())
    if not staged and spec.end - spec.start < checkpoint.layers:
        raise ExecutorError(f"SGLang cannot run {architecture} as stages of a pipeline")
    return architecture


def code_of(source: Path) -> tuple[str, str, bool]:
    """The architecture of the model in `source`, the module that has it, and whether SGLang can run
    it in stages. Raises `ExecutorError`."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    try:
        config = read_json(source / "config.json")
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    architecture = architecture_of(config, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
    return architecture, *find_code(architecture, models_directory())


def _rank_spec(spec: LoadSpec, checkpoint: Checkpoint, view: str) -> RankSpec:
    return RankSpec(
        view=view,
        start=spec.start,
        end=spec.end,
        layers=checkpoint.layers,
        dtype=checkpoint.dtype,
        kv_bytes=spec.kv_bytes,
        kv_tokens=DEFAULT_KV_TOKENS,
        size=spec.tensor_parallel,
    )
