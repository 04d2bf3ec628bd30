"""Which tokens a request has so far, as its penalties count them."""

from collections.abc import Iterable, Sequence
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from pxd.wire import History, Sampling

Tokens = NDArray[np.int64]

MAX_VOCABULARY = 1 << 20
"""No model has ids beyond it; distances between smaller ones keep a `History` small."""


def has_penalties(sampling: Sampling) -> bool:
    return (
        sampling.repetition_penalty != 1
        or sampling.presence_penalty != 0
        or sampling.frequency_penalty != 0
    )


def history_of(sampling: Sampling, tokens: Sequence[int], prompt: int) -> History | None:
    """What the last stage must know of `tokens`, of which the first `prompt` are no answer."""
    if not has_penalties(sampling):
        return None
    seen = tokens[:prompt] if sampling.repetition_penalty != 1 else ()
    return History(prompt=_gaps(set(seen)), answer=_gaps(tokens[prompt:]))


def _gaps(tokens: Iterable[int]) -> tuple[int, ...]:
    ascending = np.sort(np.fromiter(tokens, np.int64))
    return tuple(np.diff(ascending[ascending < MAX_VOCABULARY], prepend=0).tolist())


class TokenCounts:
    """Distinct `tokens` of prompt and answer, and the `counts` of each in the answer alone.

    Ids beyond the vocabulary can never be drawn, so they are left out.
    """

    __slots__ = ("counts", "tokens")

    def __init__(self, history: History, vocabulary: int) -> None:
        prompt, answer = (
            np.fromiter(accumulate(gaps), np.int64) for gaps in (history.prompt, history.answer)
        )
        tokens, places = np.unique(np.concatenate([prompt, answer]), return_inverse=True)
        counts = np.bincount(places[prompt.size :], minlength=tokens.size)
        known = tokens < vocabulary
        self.tokens: Tokens = tokens[known]
        self.counts: Tokens = counts[known]

    def add(self, token: int) -> None:
        """One more token of the answer."""
        found = np.flatnonzero(self.tokens == token)
        if found.size:
            self.counts[found] += 1
        else:
            self.tokens = np.append(self.tokens, token)
            self.counts = np.append(self.counts, 1)
