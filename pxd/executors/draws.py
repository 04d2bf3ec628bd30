"""One token for each of some rows of logits: which of them need more than the greatest logit, and
what those draw once theirs are in the memory of the host."""

from collections.abc import Sequence
from typing import Any

from numpy.typing import NDArray

from pxd.engine.sampling import Sampler, logprobs, sample
from pxd.executors.protocol import Drawn, Scored


class Choices:
    """Rows of logits, drawn from by `samplers` for the tokens at `positions`.

    Of the rows `wanted`, in this order, the logits are needed as they are; of the others just the
    greatest.
    """

    def __init__(self, samplers: Sequence[Sampler], positions: Sequence[int]) -> None:
        self._samplers, self._positions = samplers, positions
        self._drawn = [
            row
            for row, (sampler, position) in enumerate(zip(samplers, positions, strict=True))
            if not sampler.takes_greatest(position)
        ]
        self._scored = [r for r, s in enumerate(samplers) if s.sampling.logprobs is not None]
        self.wanted = sorted({*self._drawn, *self._scored})

    def tokens(self, greatest: list[int], logits: NDArray[Any] | None) -> list[Drawn]:
        """`greatest` are token ids, one for each row; `logits` ``(wanted, vocabulary)`` are
        finite, and None where no rows are wanted."""
        if logits is None:
            return list(greatest)
        tokens, places = list(greatest), {row: at for at, row in enumerate(self.wanted)}
        if self._drawn:
            own = logits[[places[row] for row in self._drawn]]
            those = [self._samplers[row] for row in self._drawn]
            chosen = sample(own, those, [self._positions[row] for row in self._drawn])
            for row, token in zip(self._drawn, chosen.tolist(), strict=True):
                tokens[row] = token
                self._samplers[row].drawn(token)
        scores: dict[int, Drawn] = {}
        if self._scored:
            own = logits[[places[row] for row in self._scored]]
            tops = [self._samplers[row].sampling.logprobs or 0 for row in self._scored]
            items = logprobs(own, [tokens[row] for row in self._scored], tops)
            scored = zip(self._scored, items, strict=True)
            scores = {row: Scored(tokens[row], item) for row, item in scored}
        return [scores.get(row, token) for row, token in enumerate(tokens)]
