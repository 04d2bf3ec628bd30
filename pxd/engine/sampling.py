"""Draws tokens from logits by counter-based random numbers.

A token's random number is a function of its request's seed and its position alone. So a replay, on
another pipeline or in another batch, draws the same token from the same logits.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pxd.wire import Sampling

Floats = NDArray[np.float64]
Tokens = NDArray[np.int64]


def uniform(seed: int, position: int) -> float:
    """A number in [0, 1) with 53 random bits: Philox 4x64 (Salmon et al. 2011) keyed by both."""
    bits = np.random.Philox(key=np.array([seed, position], np.uint64))
    return int(bits.random_raw() >> 11) * 2.0**-53


def sample(
    logits: NDArray[np.floating[Any]], samplings: Sequence[Sampling], positions: Sequence[int]
) -> Tokens:
    """Draw one token per row of `logits` ``(rows, vocabulary)``.

    Filters in the usual order: temperature, then top-k (ties with the k-th token stay), then top-p
    on what remains. Temperature 0 takes the greatest logit, the first of equals. Logits may be
    -inf, but neither NaN nor +inf nor all -inf in a row.
    """
    temperatures = np.array([sampling.temperature for sampling in samplings])
    greedy = temperatures == 0
    filtered = np.array([s.top_p < 1 or 0 < s.top_k < logits.shape[1] for s in samplings])
    draws = np.array([uniform(s.seed, p) for s, p in zip(samplings, positions, strict=True)])
    tokens = np.asarray(np.argmax(logits, axis=-1), np.int64)
    scores = logits.astype(np.float64)
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
            kth = np.partition(scores[rows], vocabulary - k, axis=-1)[:, vocabulary - k]
            scores[rows] = np.where(scores[rows] >= kth[:, None], scores[rows], -np.inf)


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
