"""Sampling against a naive definition of it, row by row."""

import math

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.engine.sampling import sample, uniform
from pxd.wire import Sampling

samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 40)),
    seed=st.integers(0, (1 << 63) - 1),
)
# Coarse values make ties, as the few bits of bfloat16 do.
logit = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.just(-math.inf))
row = st.lists(logit, min_size=17, max_size=17).filter(lambda r: max(r) > -math.inf)


def naive(logits: list[float], sampling: Sampling, position: int) -> int:
    """The definition: sort, keep top-k with ties, keep top-p, walk to the random number."""
    if sampling.temperature == 0:
        return logits.index(max(logits))
    top = max(logits)
    weights = {
        token: math.exp((value - top) / sampling.temperature) for token, value in enumerate(logits)
    }
    if 0 < sampling.top_k < len(logits):
        kth = sorted(logits, reverse=True)[sampling.top_k - 1]
        weights = {token: weight for token, weight in weights.items() if logits[token] >= kth}
    plain = sampling.top_p == 1 and not 0 < sampling.top_k < len(logits)
    order = sorted(weights) if plain else sorted(weights, key=lambda t: (-weights[t], t))
    kept, before, total = [], 0.0, float(np.sum(list(weights.values())))
    for token in order:
        if plain or not kept or before < sampling.top_p * total:
            kept.append(token)
        before += weights[token]
    target = uniform(sampling.seed, position) * sum(weights[token] for token in kept)
    reached = 0.0
    for token in kept:
        reached += weights[token]
        if reached > target:
            return token
    return max(token for token in kept if weights[token] > 0)


@settings(deadline=None)
@given(row, samplings, st.integers(0, 1 << 40))
def test_equals_the_definition(logits: list[float], sampling: Sampling, position: int) -> None:
    drawn = sample(np.array([logits], np.float32), [sampling], [position])
    assert drawn.tolist() == [naive(logits, sampling, position)]


@settings(deadline=None)
@given(st.lists(st.tuples(row, samplings, st.integers(0, 1 << 40)), min_size=1, max_size=6))
def test_a_row_draws_the_same_alone_and_in_any_batch(
    rows: list[tuple[list[float], Sampling, int]],
) -> None:
    logits = np.array([entry[0] for entry in rows], np.float32)
    together = sample(logits, [entry[1] for entry in rows], [entry[2] for entry in rows])
    alone = [
        int(sample(logits[i : i + 1], [sampling], [position])[0])
        for i, (_, sampling, position) in enumerate(rows)
    ]
    assert together.tolist() == alone


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_follow_the_distribution(top_p: float) -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    count = 4000
    logits = np.tile(np.log(probabilities), (count, 1))
    settings = [Sampling(temperature=1.0, top_p=top_p, seed=11)] * count
    drawn = np.bincount(sample(logits, settings, range(count)), minlength=5) / count
    expected = probabilities if top_p == 1 else np.array([0.5, 0.3, 0.15, 0, 0]) / 0.95
    # Four standard deviations of a binomial share.
    assert np.all(np.abs(drawn - expected) <= 4 * np.sqrt(expected * (1 - expected) / count))


def test_seed_and_position_both_matter() -> None:
    draws = {uniform(seed, position) for seed in range(30) for position in range(30)}
    assert len(draws) == 900
    assert all(0 <= draw < 1 for draw in draws)


def test_the_random_numbers_never_change() -> None:
    """A cluster of mixed versions must draw alike, so these are part of the protocol."""
    assert uniform(0, 0) == 0.011546754286331562
    assert uniform(12345, 678) == 0.3558951948059388


def test_a_tiny_temperature_takes_the_greatest() -> None:
    logits = np.array([[-1e30, 3.0, 2.9999, -np.inf]], np.float32)
    for temperature in (1e-300, 1e-9):
        setting = Sampling(temperature=temperature, seed=3)
        assert sample(logits, [setting], [0]).tolist() == [1]


def test_a_large_vocabulary_is_filtered_without_losing_anyone() -> None:
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(4, 50_000)).astype(np.float32) * 3
    settings = [
        Sampling(temperature=0.8, top_p=0.95, seed=1),
        Sampling(temperature=1.5, top_k=50, seed=2),
        Sampling(temperature=1.0, top_p=0.5, top_k=1000, seed=3),
        Sampling(temperature=1.0, seed=4),
    ]
    for position in range(5):
        drawn = sample(logits, settings, [position] * 4)
        expected = [
            naive(logits[i].astype(float).tolist(), settings[i], position) for i in range(4)
        ]
        assert drawn.tolist() == expected
