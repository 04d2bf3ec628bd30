"""Turns logits into tokens: greedily on the device, otherwise by `pxd.engine.sampling`."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from pxd.executors.draws import Choices
from pxd.executors.mlx.batch import Request
from pxd.executors.protocol import Drawn
from pxd.executors.trouble import NotFinite


class Draws:
    """Draws one token per row of `logits` ``(rows, vocabulary)``, once `arrays` are evaluated.

    A single greedy row gets exactly the token that `mlx_lm.generate_step` takes: the argument of
    the maximum of the log probabilities, computed in the model's own precision. Only rows that need
    more than that leave the device.
    """

    def __init__(
        self, logits: mx.array, requests: Sequence[Request], positions: Sequence[int]
    ) -> None:
        self._requests = requests
        samplers = [request.sampler for request in requests if request.sampler is not None]
        self._choices = Choices(samplers, positions)
        # Over all axes for a single row, as generate_step does: another kernel, other rounding.
        normaliser = (
            mx.logsumexp(logits, keepdims=True)
            if len(requests) == 1
            else mx.logsumexp(logits, axis=-1, keepdims=True)
        )
        self._greedy = mx.argmax(logits - normaliser, axis=-1)
        self._normaliser = normaliser.astype(mx.float32)
        wanted = self._choices.wanted
        self._free = logits[mx.array(wanted)].astype(mx.float32) if wanted else None
        self.arrays = [self._greedy, self._normaliser, self._free]

    def tokens(self) -> list[Drawn]:
        """Raises `NotFinite`."""
        finite = np.isfinite(np.array(self._normaliser)).reshape(len(self._requests))
        if not finite.all():
            rows = np.flatnonzero(~finite).tolist()
            raise NotFinite("the logits", tuple(self._requests[row].number for row in rows))
        logits = None if self._free is None else np.array(self._free)
        return self._choices.tokens(np.array(self._greedy).tolist(), logits)
