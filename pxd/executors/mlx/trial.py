"""Finds out, when a stage is loaded, whether its requests can decode in batches.

Not every model's code is right for mlx-lm's left-padded batch caches: some fail, some combine masks
with the wrong dimension, some compute wrong numbers without a word. So it is tried, once.
"""

import logging
from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from pxd.executors.mlx.stage import Caches, Stage

log = logging.getLogger("pxd.executors.mlx")

TRIAL_SIZES = (3, 7)
SHORT, LONG = 4, 12
# Shares of the output's norm that rounding explains. Padding mistaken for history, or a position
# counted wrongly, shows as a few per cent at least.
TOLERANCE_FLOAT32, TOLERANCE = 0.001, 0.03


def supports_batches(stage: Stage, dtype: mx.Dtype) -> bool:
    """Whether requests of different lengths in one batch get what they get alone."""
    if _chooses_blocks(stage.model):
        log.info("requests will decode one by one: padding would move the blocks they attend to")
        return False
    try:
        _try_shapes(stage, dtype)
        error, noise = _try_numbers(stage, dtype)
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError) as failure:
        log.info("requests will decode one by one; as a batch this model fails: %s", failure)
        return False
    allowed = (TOLERANCE_FLOAT32 if dtype == mx.float32 else TOLERANCE) + 3 * noise
    if not error <= allowed:  # which also holds for NaN
        log.info("requests will decode one by one; a batch differs by %.3g of the output", error)
        return False
    return True


def supports_guesses(stage: Stage, dtype: mx.Dtype) -> bool:
    """Whether several positions in one pass get what they get one by one.

    There is a model whose masks are right for whole prompts only.
    """
    together, alone = _filled(stage, LONG, dtype), _filled(stage, LONG, dtype)
    inputs = dummy_inputs(stage, 1, SHORT, dtype)
    wanted = mx.concatenate(
        [stage.forward(inputs[:, i : i + 1], alone) for i in range(SHORT)], axis=1
    )
    # Of numbers that a sum can be made of: some models bar tokens with minus infinity.
    if not mx.isfinite(mx.logsumexp(wanted, axis=-1)).all().item():
        return True  # Steps will say so; there is nothing to be learnt here.
    error = _distance(stage.forward(inputs, together), wanted)
    if not error <= (TOLERANCE_FLOAT32 if dtype == mx.float32 else TOLERANCE):
        log.info("no guesses: a pass of several positions differs by %.3g of the output", error)
        return False
    return True


def _chooses_blocks(model: nn.Module) -> bool:
    """Whether attention goes to chosen blocks of a cache, which are cut by place: with padding they
    are other ones. That shows only in contexts too long for a trial."""
    return any(getattr(module, "index_block_size", None) for module in model.modules())


def dummy_inputs(stage: Stage, batch: int, length: int, dtype: mx.Dtype) -> mx.array:
    """Inputs of the right shape that are the same every time."""
    key = mx.random.key(length)
    if stage.first:
        return mx.random.randint(0, stage.vocabulary, (batch, length), key=key)
    width = stage.width(dtype, incoming=True)
    return mx.random.normal((batch, length, width), key=key).astype(dtype)


def _merge(alone: Sequence[Caches]) -> Caches:
    return [rows[0].merge(list(rows)) for rows in zip(*alone, strict=True)]


def _filled(stage: Stage, length: int, dtype: mx.Dtype) -> Caches:
    caches = stage.make_caches()
    stage.forward(dummy_inputs(stage, 1, length, dtype), caches)
    return caches


def _try_shapes(stage: Stage, dtype: mx.Dtype) -> None:
    """A dry run of two sizes: one may happen to equal another dimension, with which a mask would
    then be combined by mistake. Raises what goes wrong."""
    alone = [_filled(stage, 2 + number % 2, dtype) for number in range(max(TRIAL_SIZES))]
    single = stage.forward(dummy_inputs(stage, 1, 1, dtype), stage.make_caches())
    for size in TRIAL_SIZES:
        together = _merge(alone[:size])
        output = stage.forward(dummy_inputs(stage, size, 1, dtype), together)
        if tuple(output.shape) != (size, *single.shape[1:]):
            raise ValueError(f"{size} requests give an output of shape {output.shape}")
        for cache in together:
            cache.extract(0)
            cache.filter(mx.array([1, 2]))


def _try_numbers(stage: Stage, dtype: mx.Dtype) -> tuple[float, float]:
    """Return (error of a batch that needs padding, error of one that needs none)."""
    short, long = _filled(stage, SHORT, dtype), _filled(stage, LONG, dtype)
    # Merging copies, so those alone can go on from the same state.
    padded, even = _merge([short, long]), _merge([short, short])
    one = dummy_inputs(stage, 1, 1, dtype)
    two = mx.concatenate([one, one])
    alone = [stage.forward(one, caches)[0] for caches in (short, long)]
    together = stage.forward(two, padded)
    control = stage.forward(two, even)
    mx.eval(alone, together, control)
    error = max(_distance(together[row], alone[row]) for row in (0, 1))
    return error, _distance(control[0], alone[0])


def _distance(a: mx.array, b: mx.array) -> float:
    """Norm of the difference as a share of the norm of `b`, of numbers that `b` has."""
    a, b = a.astype(mx.float32), b.astype(mx.float32)
    # Some models bar tokens with minus infinity.
    a, b = mx.where(mx.isinf(b), 0, a), mx.where(mx.isinf(b), 0, b)
    return float(np.array(mx.linalg.norm(a - b) / mx.linalg.norm(b)))
