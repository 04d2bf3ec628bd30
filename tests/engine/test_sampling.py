"""Sampling against a naive definition of it, row by row."""

import math
from collections import Counter
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.engine.history import history_of
from pxd.engine.sampling import Sampler, logprobs, sample, uniform
from pxd.wire import LEAST_LOGPROB, Sampling

VOCABULARY = 17
# Some lie beyond the vocabulary.
tokens = st.integers(0, VOCABULARY + 2)
samplings = st.builds(
    Sampling,
    temperature=st.one_of(st.just(0.0), st.floats(0.05, 5.0)),
    top_p=st.one_of(st.just(1.0), st.floats(0.0, 1.0)),
    top_k=st.one_of(st.just(0), st.integers(1, 40)),
    min_p=st.one_of(st.just(0.0), st.floats(0.0, 1.0)),
    seed=st.integers(0, (1 << 63) - 1),
    # Coarse, or they would make a difference in double precision only.
    repetition_penalty=st.integers(4, 16).map(lambda n: n / 8),
    presence_penalty=st.integers(-16, 16).map(lambda n: n / 8),
    frequency_penalty=st.integers(-16, 16).map(lambda n: n / 8),
    logit_bias=st.dictionaries(tokens, st.integers(-400, 400), max_size=4).map(
        lambda biases: tuple((token, bias / 4) for token, bias in biases.items())
    ),
    min_length=st.integers(0, 30),
    barred=st.lists(tokens, max_size=VOCABULARY + 2).map(tuple),
)
# Coarse values make ties, as the few bits of bfloat16 do.
logit = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.just(-math.inf))
row = st.lists(logit, min_size=VOCABULARY, max_size=VOCABULARY).filter(lambda r: max(r) > -math.inf)


def long_row(seed: int, spread: float) -> list[float]:
    """Long enough for shortcuts on the way to the greatest."""
    generator = np.random.default_rng(seed)
    values = (generator.normal(size=900) * spread).astype(np.float32).round(1)
    values[generator.random(900) < 0.1] = -np.inf
    return values.tolist()


long_rows = st.builds(long_row, st.integers(0, 1 << 32), st.floats(0, 8))


class Case(NamedTuple):
    logits: list[float]
    sampling: Sampling
    prompt: list[int]
    answer: list[int]

    @property
    def position(self) -> int:
        return len(self.prompt) + len(self.answer)

    @property
    def sampler(self) -> Sampler:
        history = history_of(self.sampling, self.prompt + self.answer, len(self.prompt))
        return Sampler(self.sampling, len(self.logits), history)


cases = st.builds(
    Case, row, samplings, st.lists(tokens, max_size=20), st.lists(tokens, max_size=20)
)
long_cases = st.builds(
    Case,
    long_rows,
    st.one_of(
        samplings,
        st.builds(
            Sampling,
            temperature=st.floats(0.05, 2),
            top_p=st.floats(0, 1),
            top_k=st.integers(0, 20),
            seed=st.integers(0, 99),
        ),
    ),
    st.lists(st.integers(0, 950), max_size=9),
    st.lists(st.integers(0, 950), max_size=9),
)


def adjusted(case: Case) -> list[float]:
    """Bar, add the bias, then the penalties one after the other."""
    sampling, scores = case.sampling, list(case.logits)
    if case.position < sampling.min_length:
        barred = [-math.inf if t in sampling.barred else score for t, score in enumerate(scores)]
        scores = barred if max(barred) > -math.inf else scores
    for token, bias in sampling.logit_bias:
        if token < len(scores):
            scores[token] += bias
    counts, seen = Counter(case.answer), {*case.prompt, *case.answer}
    for token in range(len(scores)):
        if token in seen:
            factor = sampling.repetition_penalty
            scores[token] = scores[token] / factor if scores[token] > 0 else scores[token] * factor
        if counts[token]:
            scores[token] -= sampling.presence_penalty
        scores[token] -= sampling.frequency_penalty * counts[token]
    return scores


def naive(case: Case) -> int:
    """The definition: adjust, sort, keep what the filters leave, walk to the random number."""
    sampling, scores = case.sampling, adjusted(case)
    top = max(scores)
    if sampling.temperature == 0:
        return scores.index(top)
    weights = {
        token: math.exp((value - top) / sampling.temperature) for token, value in enumerate(scores)
    }
    size = len(scores)
    plain = sampling.top_p == 1 and sampling.min_p == 0 and not 0 < sampling.top_k < size
    weights = {token: weight for token, weight in weights.items() if weight >= sampling.min_p}
    if 0 < sampling.top_k < size:
        kth = sorted(scores, reverse=True)[sampling.top_k - 1]
        weights = {token: weight for token, weight in weights.items() if scores[token] >= kth}
    order = sorted(weights) if plain else sorted(weights, key=lambda t: (-scores[t], t))
    kept, before, total = [], 0.0, math.fsum(weights.values())
    for token in order:
        if plain or not kept or before < sampling.top_p * total:
            kept.append(token)
        before += weights[token]
    target = uniform(sampling.seed, case.position) * sum(weights[token] for token in kept)
    reached = 0.0
    for token in kept:
        reached += weights[token]
        if reached > target:
            return token
    return max(token for token in kept if weights[token] > 0)


def draw(*drawn: Case) -> list[int]:
    logits = np.array([case.logits for case in drawn], np.float32)
    positions = [case.position for case in drawn]
    return sample(logits, [case.sampler for case in drawn], positions).tolist()


@settings(deadline=None, max_examples=400)
@given(st.one_of(cases, long_cases))
def test_equals_the_definition(case: Case) -> None:
    assert draw(case) == [naive(case)]


@settings(deadline=None)
@given(
    st.one_of(st.lists(cases, min_size=1, max_size=6), st.lists(long_cases, min_size=1, max_size=6))
)
def test_a_row_draws_the_same_alone_and_in_any_batch(batch: list[Case]) -> None:
    assert draw(*batch) == [token for case in batch for token in draw(case)]


@settings(deadline=None)
@given(samplings, st.lists(tokens, max_size=20), st.lists(st.integers(0, 16), max_size=20))
def test_a_sampler_that_went_along_equals_one_that_opens_later(
    sampling: Sampling, prompt: list[int], answer: list[int]
) -> None:
    """As after a preemption, or on another pipeline."""
    along = Case([0.0] * VOCABULARY, sampling, prompt, []).sampler
    for token in answer:
        along.drawn(token)
    later = Case([0.0] * VOCABULARY, sampling, prompt, answer).sampler
    if along.counts is None or later.counts is None:
        assert along.counts is later.counts
        return
    assert dict(zip(along.counts.tokens, along.counts.counts, strict=True)) == dict(
        zip(later.counts.tokens, later.counts.counts, strict=True)
    )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_bias_of_a_hundred_is_a_must_and_of_minus_a_hundred_a_ban(temperature: float) -> None:
    """For logits as models have them."""
    logits = np.linspace(-20, 20, VOCABULARY).tolist()
    best = VOCABULARY - 1
    for position in range(50):
        for bias, allowed in ((100.0, {0}), (-100.0, set(range(best)))):
            token = 0 if bias > 0 else best
            sampling = Sampling(temperature=temperature, seed=1, logit_bias=((token, bias),))
            [drawn] = draw(Case(logits, sampling, [0] * position, []))
            assert drawn in allowed


def test_only_penalties_need_a_history() -> None:
    assert history_of(Sampling(temperature=0, logit_bias=((1, 5.0),)), [1, 2], 1) is None
    found = history_of(Sampling(frequency_penalty=1), [900, 3, 7, 5, 7], 2)
    assert found is not None
    assert (found.prompt, found.answer) == ((), (5, 2, 0))
    found = history_of(Sampling(repetition_penalty=1.1), [900, 3, 3, 1 << 30, 7], 4)
    assert found is not None
    assert (found.prompt, found.answer) == ((3, 897), (7,))


@settings(deadline=None)
@given(
    st.lists(st.tuples(row, st.integers(0, 16), st.integers(0, 20)), min_size=1, max_size=5),
    st.integers(0, 4),
)
def test_logprobs_are_those_of_the_logits(
    rows: list[tuple[list[float], int, int]], place: int
) -> None:
    logits = np.array([entry[0] for entry in rows], np.float32)
    found = logprobs(logits, [entry[1] for entry in rows], [entry[2] for entry in rows])
    for (values, token, top), item in zip(rows, found, strict=True):
        total = math.log(math.fsum(math.exp(value) for value in values))
        expected = [max(value - total, LEAST_LOGPROB) for value in values]
        assert item.token == pytest.approx(expected[token])
        order = sorted(range(VOCABULARY), key=lambda t: (-values[t], t))[:top]
        assert [t for t, _ in item.top] == order
        assert [value for _, value in item.top] == pytest.approx([expected[t] for t in order])
        assert all(value <= 0 for _, value in item.top)
    at = place % len(rows)
    assert logprobs(logits[at : at + 1], [rows[at][1]], [rows[at][2]]) == [found[at]]


@pytest.mark.parametrize("top_p", [1.0, 0.9])
def test_frequencies_follow_the_distribution(top_p: float) -> None:
    probabilities = np.array([0.5, 0.3, 0.15, 0.04, 0.01])
    count = 4000
    logits = np.tile(np.log(probabilities), (count, 1))
    sampler = Sampler(Sampling(temperature=1.0, top_p=top_p, seed=11), 5)
    drawn = np.bincount(sample(logits, [sampler] * count, range(count)), minlength=5) / count
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
    for temperature in (1e-300, 1e-9):
        setting = Sampling(temperature=temperature, seed=3)
        assert draw(Case([-1e30, 3.0, 2.9999, -np.inf], setting, [], [])) == [1]


def test_greedy_rows_are_neither_copied_nor_converted() -> None:
    class Watched(np.ndarray):
        def astype(self, *_args: object, **_options: object) -> "Watched":
            raise AssertionError("converted")

    logits = np.array([[1.0, 3.0, 2.0]], np.float32).view(Watched)
    silent = Sampling(temperature=0, barred=(1,), min_length=5)
    assert sample(logits, [Sampler(silent, 3)], [5]).tolist() == [1]
    with pytest.raises(AssertionError, match="converted"):
        sample(logits, [Sampler(silent, 3)], [4])


def test_a_large_vocabulary_is_filtered_without_losing_anyone() -> None:
    """Rows of peaked and of flat distributions, alone and together."""
    generator = np.random.default_rng(5)
    logits = generator.normal(size=(7, 50_000)).astype(np.float32) * 3
    logits[4:] *= 0.1
    settings = [
        Sampling(temperature=0.8, top_p=0.95, seed=1),
        Sampling(temperature=1.5, top_k=50, seed=2),
        Sampling(temperature=1.0, top_p=0.5, top_k=1000, seed=3),
        Sampling(temperature=1.0, seed=4),
        Sampling(temperature=1.0, min_p=0.4, repetition_penalty=1.3, frequency_penalty=1, seed=5),
        Sampling(temperature=1.0, top_p=0.99, seed=6),
        Sampling(temperature=1.0, top_k=40_000, top_p=0.9, min_p=0.1, seed=7),
    ]
    for length in range(5):
        prompt = generator.integers(0, 50_000, 3000).tolist()
        batch = [
            Case(logits[i].tolist(), setting, prompt, prompt[:length])
            for i, setting in enumerate(settings)
        ]
        drawn = draw(*batch)
        assert drawn == [naive(case) for case in batch]
        assert drawn == [token for case in batch for token in draw(case)]
