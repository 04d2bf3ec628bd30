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
from typing import Any, NamedTuple

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
    kept = scores >= _at_most_kth(scores, most) if most else np.zeros(scores.shape, np.bool_)
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
    free = [row for row, sampling in enumerate(samplings) if sampling.temperature > 0]
    if not free:
        return tokens
    if len(free) < len(samplings):
        scores, samplings = scores[free], [samplings[row] for row in free]
    draws = np.array([uniform(s.seed, positions[r]) for s, r in zip(samplings, free, strict=True)])
    scores -= np.take_along_axis(scores, tokens[free, None], axis=-1)
    # After the maximum, so that a tiny temperature leads to -inf and never to NaN.
    with np.errstate(over="ignore"):
        scores /= np.array([sampling.temperature for sampling in samplings])[:, None]
    vocabulary = scores.shape[1]
    filters = [
        _Filter(s.top_k if 0 < s.top_k < vocabulary else vocabulary, s.top_p, s.min_p)
        for s in samplings
    ]
    chosen = np.empty(len(free), np.int64)
    for rows, draw in (
        ([row for row, f in enumerate(filters) if not f.cuts(vocabulary)], _draw_any),
        ([row for row, f in enumerate(filters) if f.cuts(vocabulary)], _draw_filtered),
    ):
        if rows:
            part = scores if len(rows) == len(free) else scores[rows]
            chosen[rows] = draw(part, [filters[row] for row in rows], draws[rows])
    tokens[free] = chosen
    return tokens


class _Filter(NamedTuple):
    """What of a distribution stays; `top_k` is the size of the vocabulary where all may."""

    top_k: int
    top_p: float
    min_p: float

    def cuts(self, vocabulary: int) -> bool:
        return self.top_p < 1 or self.narrows(vocabulary)

    def narrows(self, vocabulary: int) -> bool:
        """Whether something is cut before `top_p`."""
        return self.min_p > 0 or self.top_k < vocabulary


def _draw_any(scores: Floats, _filters: Sequence[_Filter], draws: Floats) -> Tokens:
    return _draw(np.exp(scores, out=scores), draws)


def _draw(weights: Floats, draws: Floats) -> Tokens:
    """Inverse of each row's cumulative distribution at `draws`."""
    cumulative = np.cumsum(weights, axis=-1)
    places = np.count_nonzero(cumulative <= draws[:, None] * cumulative[:, -1:], axis=-1)
    # Rounding may lead behind the last possible place.
    behind = np.flatnonzero(places == weights.shape[1])
    places[behind] -= 1 + np.argmax(weights[behind, ::-1] > 0, axis=-1)
    return np.asarray(places, np.int64)


def _draw_filtered(scores: Floats, filters: Sequence[_Filter], draws: Floats) -> Tokens:
    """The filters work on the few tokens of each row that may pass them, in order of likelihood."""
    least, mass = _narrow(scores, filters)
    tokens, ranked = _rank(scores, (scores >= least) & (scores > -np.inf))
    top_k = np.array([f.top_k for f in filters])[:, None]
    kth = np.take_along_axis(ranked, np.minimum(top_k, ranked.shape[1]) - 1, axis=-1)
    weights = np.exp(ranked)
    # The greatest weight is 1.
    weights[(ranked < kth) | (weights < np.array([f.min_p for f in filters])[:, None])] = 0
    # Added up one by one: padding, of which there may be more in another batch, changes nothing.
    cumulative = np.cumsum(weights, axis=-1)
    mass = np.where(np.isnan(mass), cumulative[:, -1:], mass)
    # A token stays as long as those before it do not reach top_p; the first always does.
    enough = cumulative >= np.array([f.top_p for f in filters])[:, None] * mass
    weights[:, 1:][enough[:, :-1]] = 0
    return np.take_along_axis(tokens, _draw(weights, draws)[:, None], axis=-1)[:, 0]


def _narrow(scores: Floats, filters: Sequence[_Filter]) -> tuple[Floats, Floats]:
    """A score for each row, below which its filters leave nothing: so less has to be sorted.

    And where `top_p` is of the whole vocabulary, the weight of that; else NaN.
    """
    vocabulary = scores.shape[1]
    with np.errstate(divide="ignore"):
        least = np.log([f.min_p for f in filters])[:, None] - _MARGIN
    for k in {f.top_k for f in filters} - {vocabulary}:
        rows = [row for row, f in enumerate(filters) if f.top_k == k]
        least[rows] = np.maximum(least[rows], _at_most_kth(scores[rows], k))
    mass = np.full(least.shape, np.nan)
    wide = [row for row, f in enumerate(filters) if not f.narrows(vocabulary)]
    if wide:
        top_p = np.array([filters[row].top_p for row in wide])[:, None]
        least[wide], mass[wide] = _narrow_by_mass(scores[wide], top_p)
    return least, mass


def _narrow_by_mass(scores: Floats, top_p: Floats) -> tuple[Floats, Floats]:
    weights = np.exp(scores)
    mass = weights.sum(axis=-1, keepdims=True)
    # Of n tokens, those below (1 - top_p)/n of the mass have less than 1 - top_p of it together,
    # so the others reach top_p without them.
    with np.errstate(divide="ignore"):
        least = np.log((1 - top_p) * mass / scores.shape[1]) - _MARGIN
    # Mostly the likeliest thousand reach it, too.
    likely = _at_most_kth(scores, min(_LIKELY, scores.shape[1]))
    weights[scores < likely] = 0
    reached = weights.sum(axis=-1, keepdims=True) > top_p * mass * (1 + _MARGIN)
    return np.where(reached, np.maximum(least, likely), least), mass


_MARGIN = 1e-9
_LIKELY = 1024
_BLOCK = 64


def _at_most_kth(scores: Floats, k: int) -> Floats:
    """No more than the k-th greatest score of each row, in a column, and not much less.

    It is that of the maxima of blocks: of every `_BLOCK` scores one, so there is little to sort.
    """
    rows, vocabulary = scores.shape
    blocks = vocabulary // _BLOCK
    if k <= blocks // 2:
        scores = scores[:, : blocks * _BLOCK].reshape(rows, _BLOCK, blocks).max(axis=1)
    place = scores.shape[1] - k
    return np.partition(scores, place, axis=-1)[:, place, None]


def _rank(scores: Floats, keep: NDArray[np.bool_]) -> tuple[Tokens, Floats]:
    """Kept tokens and scores of each row from likely to unlikely, padded with -inf.

    Equal scores rank by token id, so that a row ranks the same in any batch.
    """
    rows, columns = np.divmod(np.flatnonzero(keep), scores.shape[1])
    counts = np.bincount(rows, minlength=scores.shape[0])
    places = np.arange(rows.size) - np.repeat(np.cumsum(counts) - counts, counts)
    tokens = np.zeros((scores.shape[0], counts.max()), np.int64)
    padded = np.full(tokens.shape, -np.inf)
    tokens[rows, places] = columns
    padded[rows, places] = scores[rows, columns]
    order = np.argsort(-padded, axis=-1, kind="stable")
    return np.take_along_axis(tokens, order, axis=-1), np.take_along_axis(padded, order, axis=-1)
