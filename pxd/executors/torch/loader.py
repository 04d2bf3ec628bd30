"""Loads a stage through transformers' own loader, so that every safetensors format that it knows
works here: experts that have to be stacked, names of older releases, quantised weights.

It is given tensors of the files that are there, unread; it reads those that the stage has.
"""

import contextlib
import copy
from pathlib import Path
from typing import Any

import torch

from pxd.executors.memory import ADVICE, check_fits, compare, stage_bytes
from pxd.executors.protocol import ExecutorError, Progress
from pxd.executors.torch.attention import NAME
from pxd.executors.torch.device import free_memory
from pxd.executors.torch.kv import KvPool, Rows
from pxd.executors.torch.skeleton import make_skeleton, model_class, read_config
from pxd.executors.torch.split import CannotSplit, SplitPlan, plan_split
from pxd.executors.torch.stage import Stage, stage_class
from pxd.executors.torch.weights.files import StageTensors
from pxd.executors.torch.weights.formats import is_needed, quantization_of
from pxd.models.describe import Checkpoint

LISTED_NAMES = 5
TRIAL_TOKENS, TRIAL_CHUNK = 12, 7
# Shares of an output's norm that rounding explains. Positions counted wrongly, or something that a
# model's own attention does and ours does not, show as several per cent at least.
TOLERANCE_FLOAT32, TOLERANCE = 0.001, 0.05


def load_stage(
    directory: Path,
    checkpoint: Checkpoint,
    start: int,
    end: int,
    device: torch.device,
    progress: Progress,
) -> Stage:
    """Load layers [start, end). Raises `ExecutorError`, also for a range that may not be cut."""
    if not 0 <= start < end <= checkpoint.layers:
        raise ExecutorError(
            f"there are no layers [{start}, {end}) in a model of {checkpoint.layers}"
        )
    config = read_config(directory)
    quantization = quantization_of(config)
    plan = _planned(config, checkpoint, start, end)
    if end < checkpoint.layers:
        # The weights of the projection are not here to be shared.
        config = copy.deepcopy(config)
        config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    made = stage_class(model_class(config), plan, start, end)
    with contextlib.ExitStack() as files:
        tensors = StageTensors(directory, checkpoint, start, end, quantization, files, progress)
        if quantization is None:
            computed = stage_bytes(checkpoint, start, end)
        else:
            computed = _held(made, config, tensors.dtype)
        check_fits(computed, free_memory(device), ADVICE)
        model, found = made.from_pretrained(
            None,
            config=config,
            state_dict=tensors.named,
            dtype=tensors.dtype,
            attn_implementation=NAME,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
        )
    _check_found(found, checkpoint, quantised=quantization is not None)
    stage = Stage(model.requires_grad_(False).eval().to(device), plan, start, end)
    compare(computed, stage.weight_bytes)
    _try_attention(stage)
    progress(1.0)
    return stage


def _held(made: Any, config: Any, dtype: torch.dtype) -> int:
    """Bytes that the weights take as plain numbers."""
    with torch.device("meta"):
        model = made._from_config(config, attn_implementation=NAME, dtype=dtype)
    return sum(parameter.nbytes for parameter in model.parameters())


def _check_found(found: Any, checkpoint: Checkpoint, *, quantised: bool) -> None:
    if found["mismatched_keys"]:
        names = [name for name, *_ in found["mismatched_keys"]]
        raise ExecutorError(f"tensors of the wrong shape: {_listed(names)}")
    if found["missing_keys"]:
        raise ExecutorError(f"the checkpoint lacks {_listed(found['missing_keys'])}")
    unread = [
        name
        for name in found["unexpected_keys"]
        if checkpoint.layer_of(name) is not None and is_needed(name)
    ]
    if quantised and unread:
        # Weights without something that belongs to them would be wrong without a word.
        raise ExecutorError(f"quantised weights come with what is not known: {_listed(unread)}")


def _planned(config: Any, checkpoint: Checkpoint, start: int, end: int) -> SplitPlan:
    try:
        plan = plan_split(make_skeleton(config), checkpoint.layers)
    except CannotSplit as error:
        raise ExecutorError(
            f"the torch executor cannot run {checkpoint.architecture}: {error}"
        ) from error
    for cut in (start, end):
        if 0 < cut < plan.layers and cut not in plan.splits:
            allowed = ", ".join(map(str, plan.splits)) or "nowhere"
            raise ExecutorError(
                f"{checkpoint.architecture} cannot be cut before layer {cut}; allowed: {allowed}"
            )
    return plan


def _listed(names: Any) -> str:
    more = f" and {len(names) - LISTED_NAMES} more" if len(names) > LISTED_NAMES else ""
    return ", ".join(sorted(names)[:LISTED_NAMES]) + more


def _try_attention(stage: Stage) -> None:
    """Compare attention over blocks, in two chunks, with the model's own. Raises `ExecutorError`.

    Not all that models do to attention reaches the function that they call, and what does not would
    make wrong numbers without a word.
    """
    inputs = _dummy_inputs(stage, TRIAL_TOKENS)
    positions = torch.arange(TRIAL_TOKENS, device=stage.device)
    pool = KvPool(stage.shapes, 1, stage.dtype, stage.device)
    parts = []
    for begin, end in ((0, TRIAL_CHUNK), (TRIAL_CHUNK, TRIAL_TOKENS)):
        rows = Rows(pool, [(begin, end - begin, [0])])
        wanted = torch.arange(end - begin, device=stage.device)
        parts.append(stage.forward(inputs[begin:end], rows.positions, rows, wanted))
    got = torch.cat(parts).float()
    stage.model.set_attn_implementation("eager")
    try:
        wanted_of_all = torch.arange(TRIAL_TOKENS, device=stage.device)
        own = stage.forward(inputs, positions, None, wanted_of_all).float()
    finally:
        stage.model.set_attn_implementation(NAME)
    if not bool(torch.isfinite(own).all()):
        return  # Steps will say so; there is nothing to be learnt here.
    # The median, for where experts are about equally good, rounding sends a position to others.
    errors = torch.linalg.norm(got - own, dim=-1) / torch.linalg.norm(own, dim=-1)
    error = float(errors.median())
    allowed = TOLERANCE_FLOAT32 if stage.dtype == torch.float32 else TOLERANCE
    if not error <= allowed:  # which also holds for NaN
        raise ExecutorError(
            f"{stage.model.config.model_type} attends in a way that the torch executor does not "
            f"know: its output differs by {error:.3g} of its size"
        )


def _dummy_inputs(stage: Stage, count: int) -> torch.Tensor:
    """The same every time."""
    source = torch.Generator().manual_seed(count)
    if stage.first:
        made = torch.randint(0, stage.vocabulary, (count,), generator=source)
    else:
        made = torch.randn(count, stage.hidden_size, generator=source).to(stage.dtype)
    return made.to(stage.device)
