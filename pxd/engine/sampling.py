"""Draws tokens from logits by counter-based random numbers.

A token's random number is a function of its request's seed and its position alone, and every row is
computed in float64 by itself. So a replay, on another pipeline or in another batch, draws the same
token from the same logits.

A row's logits are changed in this order, which is vLLM's: barred tokens, logit bias, repetition
penalty (positive logits are divided by it, others multiplied, as in CTRL, Keskar et al. 2019, and
Hugging Face's transformers; prompt and answer), presence and frequency penalty (subtracted, as
OpenAI defines them; answer only). With temperature 0 the greatest is taken, the first of equals.
Otherwise they are divided by the temperature, and of the probabilities there stay those of at least
`min_p` times the greatest, then the `top_k` greatest with all that equal the last of them, then the
fewest that have `top_p` of what is left.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxd.engine.history import TokenCounts
from pxd.wire import LEAST_LOGPROB, History, Logprobs, Sampling

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]
Logits = NDArray[np.floating[Any]]


class Sampler:
    """How one request's tokens are drawn from a vocabulary, and what was drawn so far.

    Tokens beyond the vocabulary mean nothing, whatever the `sampling` says of them.
    """

    __slots__ = ("barred", "bias", "biased", "counts", "sampling")

    def __init__(self, sampling: Sampling, vocabulary: int, history: History | None = None) -> None:
        self.sampling = sampling
        known = [(token, bias) for token, bias in sampling.logit_bias if token < vocabulary]
        self.biased: Tokens = np.array([token for token, _ in known], np.int64)
        self.bias: Floats = np.array([bias for _, bias in known], np.float64)
        barred = [token for token in sampling.barred if token < vocabulary]
        self.barred: Tokens = np.array(barred, np.int64)
        self.counts = None if history is None else TokenCounts(history, vocabulary)

    def takes_greatest(self, position: int) -> bool:
        """Whether the token at `position` is simply that of the greatest logit."""
        return (
            self.sampling.temperature == 0
            and not self.biased.size
            and self.counts is None
            and not self.bars(position)
        )

    def bars(self, position: int) -> bool:
        return position < self.sampling.min_length and self.barred.size > 0

    def drawn(self, token: int) -> None:
        """The request's next token."""
        if self.counts is not None:
            self.counts.add(token)


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox 4x64 (Salmon et al. 2011) keyed by both."""
    bits = np.random.Philox(key=np.array([seed, position], np.uint64))
    return int(bits.random_raw() >> 11) * 2.0**-53


def sample(logits: Logits, samplers: Sequence[Sampler], positions: Sequence[int]) -> Tokens:
    """Draw one token per row of `logits` ``(rows, vocabulary)``; see above for how.

    Logits may be -inf, but neither NaN nor +inf nor all -inf in a row. Where all but the barred
    tokens are -inf, none is barred.
    """
    tokens = np.asarray(np.argmax(logits, axis=-1), np.int64)
    busy = [
        row
        for row, (sampler, position) in enumerate(zip(samplers, positions, strict=True))
        if not sampler.takes_greatest(position)
    ]
    if busy:
        chosen, places = [samplers[row] for row in busy], [positions[row] for row in busy]
        scores = logits[busy].astype(np.float64)
        _bar(
            scores, [s.barred if s.bars(p) else _NONE for s, p in zip(chosen, places, strict=True)]
        )
        _add_bias(scores, chosen)
        _penalise(scores, chosen)
        tokens[busy] = _choose(scores, [sampler.sampling for sampler in chosen], places)
    return tokens


def logprobs(logits: Logits, tokens: Sequence[int], tops: Sequence[int]) -> list[Logprobs]:
    """What each row's model thinks of its token, and of the `tops` likeliest; ties by token id.

    These are of the logits as they are: before temperature, bias, penalties and filters.
    """
    scores = logits.astype(np.float64)
    scores -= scores.max(axis=-1, keepdims=True)
    scores -= np.log(np.exp(scores).sum(axis=-1, keepdims=True))
    own = np.maximum(np.take_along_axis(scores, np.array(tokens)[:, None], axis=-1), LEAST_LOGPROB)
    most = min(max(tops), scores.shape[1])
    kept = scores >= _kth(scores, most) if most else np.zeros(scores.shape, np.bool_)
    ids, ranked = _rank(scores, kept)
    likeliest = zip(ids.tolist(), np.maximum(ranked, LEAST_LOGPROB).tolist(), tops, strict=True)
    return [
        Logprobs(value, tuple(zip(best[:top], values[:top], strict=True)))
        for value, (best, values, top) in zip(own[:, 0].tolist(), likeliest, strict=True)
    ]


_NONE: Tokens = np.array([], np.int64)


def _spread(parts: Sequence[Tokens]) -> tuple[Tokens, Tokens]:
    """Row and column of every token, row after row."""
    rows = np.repeat(np.arange(len(parts)), [part.size for part in parts])
    return rows, np.concatenate(parts)


def _bar(scores: Floats, barred: Sequence[Tokens]) -> None:
    rows, columns = _spread(barred)
    if not rows.size:
        return
    before = scores[rows, columns]
    scores[rows, columns] = -np.inf
    lost = np.isneginf(scores.max(axis=-1))[rows]
    scores[rows[lost], columns[lost]] = before[lost]


def _add_bias(scores: Floats, samplers: Sequence[Sampler]) -> None:
    rows, columns = _spread([sampler.biased for sampler in samplers])
    if rows.size:
        np.add.at(scores, (rows, columns), np.concatenate([sampler.bias for sampler in samplers]))


def _penalise(scores: Floats, samplers: Sequence[Sampler]) -> None:
    rows, columns = _spread([s.counts.tokens if s.counts else _NONE for s in samplers])
    if not rows.size:
        return
    counts = np.concatenate([s.counts.counts if s.counts else _NONE for s in samplers])

    def each(penalty: Callable[[Sampling], float]) -> Floats:
        return np.array([penalty(sampler.sampling) for sampler in samplers])[rows]

    values = scores[rows, columns]
    repetition = each(lambda sampling: sampling.repetition_penalty)
    values = np.where(values > 0, values / repetition, values * repetition)
    values -= each(lambda sampling: sampling.presence_penalty) * (counts > 0)
    values -= each(lambda sampling: sampling.frequency_penalty) * counts
    scores[rows, columns] = values


def _choose(scores: Floats, samplings: Sequence[Sampling], positions: Sequence[int]) -> Tokens:
    """By temperature, filters and random numbers; overwrites `scores`."""
    tokens = np.asarray(np.argmax(scores, axis=-1), np.int64)
    temperatures = np.array([sampling.temperature for sampling in samplings])
    greedy = temperatures == 0
    filtered = np.array(
        [s.top_p < 1 or s.min_p > 0 or 0 < s.top_k < scores.shape[1] for s in samplings]
    )
    draws = np.array([uniform(s.seed, p) for s, p in zip(samplings, positions, strict=True)])
    scores -= scores.max(axis=-1, keepdims=True)
    # After the maximum, so that a tiny temperature leads to -inf and never to NaN.
    with np.errstate(over="ignore"):
        scores /= np.where(greedy, 1, temperatures)[:, None]
    free = np.flatnonzero(~greedy & ~filtered)
    if free.size:
        tokens[free] = _draw(np.exp(scores[free]), draws[free])
    cut = np.flatnonzero(~greedy & filtered)
    if cut.size:
        chosen = [samplings[row] for row in cut.tolist()]
        tokens[cut] = _draw_filtered(scores[cut], chosen, draws[cut])
    return tokens


def _draw(weights: Floats, draws: Floats) -> Tokens:
    """Inverse of each row's cumulative distribution at `draws`."""
    cumulative = np.cumsum(weights, axis=-1)
    places = np.count_nonzero(cumulative <= draws[:, None] * cumulative[:, -1:], axis=-1)
    # Rounding may lead behind the last possible place.
    last = weights.shape[1] - 1 - np.argmax(weights[:, ::-1] > 0, axis=-1)
    return np.asarray(np.minimum(places, last), np.int64)


def _draw_filtered(scores: Floats, samplings: Sequence[Sampling], draws: Floats) -> Tokens:
    _apply_top_k(scores, samplings)
    weights = np.exp(scores)
    # The greatest weight is 1.
    weights[weights < np.array([sampling.min_p for sampling in samplings])[:, None]] = 0
    mass = weights.sum(axis=-1, keepdims=True)
    top_p = np.array([sampling.top_p for sampling in samplings])[:, None]
    # Of n tokens, those below (1 - top_p)/n of the mass have less than 1 - top_p of it together,
    # so the others reach top_p without them: no need to sort the whole vocabulary.
    floor = (1 - top_p) * mass / scores.shape[1]
    keep = (weights >= floor * (1 - 1e-9)) & (weights > 0)
    tokens, ranked = _rank(scores, keep)
    weights = np.exp(ranked)
    before = np.zeros(weights.shape)
    before[:, 1:] = np.cumsum(weights, axis=-1)[:, :-1]
    # A token stays as long as those before it do not reach top_p; the first always does.
    cut = before >= top_p * mass
    cut[:, 0] = False
    weights[cut] = 0
    places = _draw(weights, draws)
    return np.take_along_axis(tokens, places[:, None], axis=-1)[:, 0]


def _apply_top_k(scores: Floats, samplings: Sequence[Sampling]) -> None:
    """Set what is below the k-th score of its row to -inf, in place."""
    vocabulary = scores.shape[1]
    top_k = np.array([sampling.top_k for sampling in samplings])
    for k in set(top_k.tolist()):
        if 0 < k < vocabulary:
            rows = np.flatnonzero(top_k == k)
            chosen = scores[rows]
            scores[rows] = np.where(chosen >= _kth(chosen, k), chosen, -np.inf)


def _kth(scores: Floats, k: int) -> Floats:
    """The k-th greatest score of each row, in a column."""
    place = scores.shape[1] - k
    return np.partition(scores, place, axis=-1)[:, place, None]


def _rank(scores: Floats, keep: NDArray[np.bool_]) -> tuple[Tokens, Floats]:
    """Kept tokens and scores of each row from likely to unlikely, padded with -inf.

    Equal scores rank by token id, so that a row ranks the same in any batch.
    """
    rows, columns = np.nonzero(keep)
    counts = keep.sum(axis=-1)
    places = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.zeros((scores.shape[0], counts.max()), np.int64)
    padded = np.full(tokens.shape, -np.inf)
    tokens[rows, places] = columns
    padded[rows, places] = scores[rows, columns]
    order = np.argsort(-padded, axis=-1, kind="stable")
    return np.take_along_axis(tokens, order, axis=-1), np.take_along_axis(padded, order, axis=-1)
