"""Turns logits into tokens: greedily on the device, otherwise by `pxd.engine.sampling`."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pxd.engine.sampling import logprobs, sample
from pxd.executors.mlx.batch import Request
from pxd.executors.mlx.trouble import NotFinite
from pxd.executors.protocol import Drawn, Scored


class Draws:
    """Draws one token per row of `logits` ``(rows, vocabulary)``, once `arrays` are evaluated.

    A single greedy row gets exactly the token that `mlx_lm.generate_step` takes: the argument of
    the maximum of the log probabilities, computed in the model's own precision. Only rows that need
    more than that leave the device.
    """

    def __init__(
        self, logits: mx.array, requests: Sequence[Request], positions: Sequence[int]
    ) -> None:
        self._requests, self._positions = requests, positions
        self._samplers = [request.sampler for request in requests if request.sampler is not None]
        # Over all axes for a single row, as generate_step does: another kernel, other rounding.
        normaliser = (
            mx.logsumexp(logits, keepdims=True)
            if len(requests) == 1
            else mx.logsumexp(logits, axis=-1, keepdims=True)
        )
        self._greedy = mx.argmax(logits - normaliser, axis=-1)
        self._normaliser = normaliser.astype(mx.float32)
        self._drawn = [
            row
            for row, (sampler, position) in enumerate(zip(self._samplers, positions, strict=True))
            if not sampler.takes_greatest(position)
        ]
        self._scored = [r for r, s in enumerate(self._samplers) if s.sampling.logprobs is not None]
        self._wanted = sorted({*self._drawn, *self._scored})
        self._free = logits[mx.array(self._wanted)].astype(mx.float32) if self._wanted else None
        self.arrays = [self._greedy, self._normaliser, self._free]

    def tokens(self) -> list[Drawn]:
        """Raises `NotFinite`."""
        requests, samplers = self._requests, self._samplers
        finite = np.isfinite(np.array(self._normaliser)).reshape(len(requests))
        if not finite.all():
            rows = np.flatnonzero(~finite).tolist()
            raise NotFinite("the logits", tuple(requests[row].number for row in rows))
        tokens: list[int] = np.array(self._greedy).tolist()
        if not self._wanted:
            return list(tokens)
        host, places = np.array(self._free), {row: at for at, row in enumerate(self._wanted)}
        if self._drawn:
            own = host[[places[row] for row in self._drawn]]
            those = [samplers[row] for row in self._drawn]
            chosen = sample(own, those, [self._positions[row] for row in self._drawn])
            for row, token in zip(self._drawn, chosen.tolist(), strict=True):
                tokens[row] = token
                samplers[row].drawn(token)
        scores: dict[int, Drawn] = {}
        if self._scored:
            own = host[[places[row] for row in self._scored]]
            tops = [samplers[row].sampling.logprobs or 0 for row in self._scored]
            items = logprobs(own, [tokens[row] for row in self._scored], tops)
            scored = zip(self._scored, items, strict=True)
            scores = {row: Scored(tokens[row], item) for row, item in scored}
        return [scores.get(row, token) for row, token in enumerate(tokens)]
