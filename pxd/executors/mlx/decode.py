"""Turns logits into tokens: greedily on the device, otherwise by `pxd.engine.sampling`."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pxd.engine.sampling import logprobs, sample
from pxd.executors.mlx.batch import Request
from pxd.executors.mlx.stage import Caches
from pxd.executors.protocol import Drawn, Scored


class NotFinite(Exception):
    """The model computed NaN or infinity for these requests."""

    def __init__(self, requests: tuple[int, ...]) -> None:
        super().__init__(f"the logits of requests {requests} are not finite")


def draw_tokens(
    logits: mx.array, requests: Sequence[Request], positions: Sequence[int], caches: Caches
) -> list[Drawn]:
    """Draw one token per row of `logits` ``(rows, vocabulary)``; evaluates `caches` along.

    A single greedy row gets exactly the token that `mlx_lm.generate_step` takes: the argument of
    the maximum of the log probabilities, computed in the model's own precision. Only rows that need
    more than that leave the device.
    """
    samplers = [request.sampler for request in requests if request.sampler is not None]
    # Over all axes for a single row, as generate_step does: another kernel, other rounding.
    normaliser = (
        mx.logsumexp(logits, keepdims=True)
        if len(requests) == 1
        else mx.logsumexp(logits, axis=-1, keepdims=True)
    )
    greedy = mx.argmax(logits - normaliser, axis=-1)
    drawn = [
        row
        for row, (sampler, position) in enumerate(zip(samplers, positions, strict=True))
        if not sampler.takes_greatest(position)
    ]
    scored = [row for row, s in enumerate(samplers) if s.sampling.logprobs is not None]
    wanted = sorted({*drawn, *scored})
    free = logits[mx.array(wanted)].astype(mx.float32) if wanted else None
    normaliser = normaliser.astype(mx.float32)
    mx.eval(greedy, normaliser, free, [cache.state for cache in caches])
    finite = np.isfinite(np.array(normaliser)).reshape(len(requests))
    if not finite.all():
        raise NotFinite(tuple(requests[row].number for row in np.flatnonzero(~finite).tolist()))
    tokens: list[int] = np.array(greedy).tolist()
    if not wanted:
        return list(tokens)
    host, places = np.array(free), {row: place for place, row in enumerate(wanted)}
    if drawn:
        own = host[[places[row] for row in drawn]]
        chosen = sample(own, [samplers[row] for row in drawn], [positions[row] for row in drawn])
        for row, token in zip(drawn, chosen.tolist(), strict=True):
            tokens[row] = token
            samplers[row].drawn(token)
    scores: dict[int, Drawn] = {}
    if scored:
        own = host[[places[row] for row in scored]]
        tops = [samplers[row].sampling.logprobs or 0 for row in scored]
        items = logprobs(own, [tokens[row] for row in scored], tops)
        scores = {row: Scored(tokens[row], item) for row, item in zip(scored, items, strict=True)}
    return [scores.get(row, token) for row, token in enumerate(tokens)]
