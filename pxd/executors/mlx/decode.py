"""Turns logits into tokens: greedily on the device, otherwise by `pxd.engine.sampling`."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pxd.engine.sampling import sample
from pxd.executors.mlx.batch import Request
from pxd.executors.mlx.stage import Caches


class NotFinite(Exception):
    """The model computed NaN or infinity for these requests."""

    def __init__(self, requests: tuple[int, ...]) -> None:
        super().__init__(f"the logits of requests {requests} are not finite")


def draw_tokens(
    logits: mx.array, requests: Sequence[Request], positions: Sequence[int], caches: Caches
) -> list[int]:
    """Draw one token per row of `logits` ``(rows, vocabulary)``; evaluates `caches` along.

    A single greedy row gets exactly the token that `mlx_lm.generate_step` takes: the argument of
    the maximum of the log probabilities, computed in the model's own precision.
    """
    # Over all axes for a single row, as generate_step does: another kernel, other rounding.
    normaliser = (
        mx.logsumexp(logits, keepdims=True)
        if len(requests) == 1
        else mx.logsumexp(logits, axis=-1, keepdims=True)
    )
    greedy = mx.argmax(logits - normaliser, axis=-1)
    drawn = [row for row, request in enumerate(requests) if request.sampling.temperature > 0]
    free = logits[mx.array(drawn)].astype(mx.float32) if drawn else None
    normaliser = normaliser.astype(mx.float32)
    mx.eval(greedy, normaliser, free, [cache.state for cache in caches])
    finite = np.isfinite(np.array(normaliser)).reshape(len(requests))
    if not finite.all():
        raise NotFinite(tuple(requests[row].number for row in np.flatnonzero(~finite).tolist()))
    tokens = [int(token) for token in np.array(greedy)]
    if drawn:
        samplings = [requests[row].sampling for row in drawn]
        chosen = sample(np.array(free), samplings, [positions[row] for row in drawn])
        for row, token in zip(drawn, chosen.tolist(), strict=True):
            tokens[row] = token
    return tokens
