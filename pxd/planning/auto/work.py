"""What a model's layers cost, per layer, for a number of tokens at once."""

import numpy as np
import numpy.typing as npt

from pxd.planning.model import ModelCost

Floats = npt.NDArray[np.float64]


def floats(values: object) -> Floats:
    return np.asarray(values, dtype=np.float64)


class Work:
    """FLOPs and bytes moved, one entry per layer, for requests of `prompt` and `output` tokens.

    The arithmetic of a layer of experts is that of the experts a token chooses; its traffic is
    every expert that any of the tokens chooses, as in the model of Parallax v0.1.2.
    """

    def __init__(self, model: ModelCost, prompt: int, output: int) -> None:
        self._model = model
        # Two FLOPs per weight of two bytes, where nobody has counted them.
        self._flops = floats(model.layer_flops or model.layer_bytes)
        self._attention = floats(model.attention_flops or (0,) * model.layers)
        self._weights = floats(model.layer_bytes)
        self._kv = floats(model.kv_bytes_per_token)
        self._state = floats(model.state_bytes or (0,) * model.layers)
        windows = floats(model.windows or (0,) * model.layers)
        self._windows = np.where(windows > 0, windows, np.inf)
        experts = [e for e in model.experts if e is not None]
        self._experts = model.experts if experts else ()
        self.prompt, self.output = prompt, output

    def request_bytes(self) -> Floats:
        """KV and state of a whole request."""
        positions = np.minimum(self.prompt + self.output, self._windows)
        return self._kv * positions + self._state

    def decode(self, batch: int) -> tuple[Floats, Floats]:
        """(FLOPs, bytes moved) of one token of each of `batch` requests, half-way through."""
        seen = np.minimum(self.prompt + self.output / 2, self._windows)
        flops = batch * (self._flops + self._attention * seen)
        moved = self._read(batch) + batch * (self._kv * seen + self._state)
        return flops, moved

    def prefill(self, tokens: int) -> tuple[Floats, Floats]:
        """(FLOPs, bytes moved) of one chunk of a prompt, on average over the prompt."""
        seen = np.minimum(self.prompt / 2, self._windows)
        flops = tokens * (self._flops + self._attention * seen)
        return flops, self._read(tokens) + self._kv * (seen + tokens)

    def head(self, batch: int) -> tuple[float, float]:
        flops = self._model.head_flops or self._model.head_bytes
        return float(batch * flops), float(self._model.head_bytes)

    def _read(self, tokens: int) -> Floats:
        """Bytes of weights that `tokens` tokens touch: of the experts, those somebody chose."""
        weights = self._weights
        for layer, experts in enumerate(self._experts):
            if experts is not None and experts.total > 0:
                idle = experts.total * (1 - min(1.0, experts.active / experts.total)) ** tokens
                if weights is self._weights:
                    weights = weights.copy()
                weights[layer] -= idle * experts.bytes_each
        return np.maximum(weights, 0.0)
