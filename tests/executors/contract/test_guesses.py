"""An engine with rows of several draws: what it draws, takes back, and refuses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.history import history_of
from pxd.executors.backends import load_backend
from pxd.executors.protocol import Engine, LoadSpec, Scored, StepRejected
from pxd.wire import MAX_DRAWS, MAX_GUESSES, Opening, Row, Sampling, Step, Tensor
from tests.executors.pipeline import GREEDY, Pipeline, granted, new_engine
from tests.tiny_models import make_tiny_model

LAYERS = 6
PROMPT = list(range(30, 50))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny_model("qwen3", directory, dtype="float32")


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_several_draws_are_those_of_as_many_steps(
    kind: str, model: Path, cuts: Sequence[int], temperature: float
) -> None:
    sampling = {1: Sampling(temperature=temperature, seed=7)}
    pipeline = Pipeline.load(model, LAYERS, cuts, kinds=[kind])
    pipeline.prefill(1, PROMPT, samplings=sampling)
    text = list(PROMPT)
    for _ in range(20):
        text += pipeline.step([(1, len(text) - 1, text[-1:], 1)])
    pipeline.release([1])

    pipeline.prefill(1, PROMPT, samplings=sampling)
    begin = len(PROMPT) - 1
    drawn = pipeline.step([(1, begin, text[begin : begin + 9], 9)])
    assert list(drawn) == text[begin + 1 : begin + 10]
    # Of these guesses the third is wrong: up to it the draws are right, and it is taken back.
    guesses = text[begin + 9 : begin + 15]
    guesses[3] = (guesses[3] + 1) % 200
    drawn = pipeline.step([(1, begin + 9, guesses, 6)])
    assert list(drawn[:3]) == text[begin + 10 : begin + 13]
    drawn = pipeline.step([(1, begin + 12, text[begin + 12 : begin + 15], 3)])
    assert list(drawn) == text[begin + 13 : begin + 16]
    # All of them may be taken back, too, by a row without guesses.
    assert pipeline.step([(1, begin + 13, text[begin + 13 : begin + 14], 1)]) == (text[begin + 14],)


def test_who_guesses_and_who_does_not_share_a_step(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, (3,), kinds=[kind])
    prompts = [[5, 6, 7, 8], [9, 8, 7, 6, 5, 4], [3, 1, 4, 1, 5]]
    texts = [p + pipeline.generate(p, 12, request=10 + n) for n, p in enumerate(prompts)]
    at = [len(prompt) - 1 for prompt in prompts]
    for number, prompt in enumerate(prompts):
        pipeline.prefill(number, prompt)
    # Together at first, so that the one who guesses must be taken out of the batch.
    for draws in ((1, 1, 1), (1, 4, 1), (2, 1, 1), (1, 1, 5)):
        rows = [
            (n, at[n], texts[n][at[n] : at[n] + draws[n]], draws[n]) for n in range(len(prompts))
        ]
        wanted = [t for n in range(3) for t in texts[n][at[n] + 1 : at[n] + 1 + draws[n]]]
        assert list(pipeline.step(rows)) == wanted
        at = [place + count for place, count in zip(at, draws, strict=True)]


def test_each_draw_has_its_log_probabilities(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, kinds=[kind])
    sampling = {1: Sampling(temperature=0, logprobs=2)}
    pipeline.prefill(1, PROMPT, samplings=sampling)
    text, scores = list(PROMPT), []
    for _ in range(3):
        (drawn,) = pipeline.step([(1, len(text) - 1, text[-1:], 1)])
        text.append(drawn.token)
        scores.append(drawn)
    pipeline.release([1])
    pipeline.prefill(1, PROMPT, samplings=sampling)
    together = pipeline.step([(1, len(PROMPT) - 1, text[len(PROMPT) - 1 : -1], 3)])
    assert all(isinstance(drawn, Scored) for drawn in together)
    assert [drawn.token for drawn in together] == [drawn.token for drawn in scores]
    for one, other in zip(together, scores, strict=True):
        assert one.logprobs.token == pytest.approx(other.logprobs.token, abs=1e-3)


def loaded(kind: str, path: Path) -> tuple[Engine, bool]:
    engine = new_engine(kind)
    info = engine.load(LoadSpec(path=str(path), start=0, end=LAYERS), lambda _: None)
    return engine, info.trims


def run(engine: Engine, rows: Sequence[Row], openings: Sequence[Opening] = ()) -> object:
    count = sum(row.count for row in rows)
    step = Step(
        pipeline="p",
        session=0,
        step=0,
        rows=tuple(rows),
        tensor=Tensor("i32", (count,)),
        openings=tuple(openings),
        grants=tuple(granted(opening.request) for opening in openings),
    )
    return engine.step(step, np.ones(count, "<i4").tobytes())


def refused(engine: Engine, rows: Sequence[Row], openings: Sequence[Opening] = ()) -> str:
    with pytest.raises(StepRejected) as caught:
        run(engine, rows, openings)
    assert caught.value.code == "bad-step"
    return str(caught.value)


def test_only_guesses_are_taken_back_and_only_once(kind: str, model: Path) -> None:
    engine, trims = loaded(kind, model)
    assert trims
    run(engine, [Row(1, 0, 4, 0)], [Opening(1, GREEDY)])
    assert "goes on at 3" in refused(engine, [Row(1, 3, 1, 1)])
    run(engine, [Row(1, 4, 4, 3)])
    assert "goes on at 5" in refused(engine, [Row(1, 5, 1, 1)])
    run(engine, [Row(1, 6, 1, 1)])
    assert "goes on at 6" in refused(engine, [Row(1, 6, 1, 1)])
    run(engine, [Row(1, 7, 1, 1)])


def test_too_many_draws_are_refused(kind: str, model: Path) -> None:
    engine, _ = loaded(kind, model)
    draws = 1 + MAX_GUESSES
    count = MAX_DRAWS // draws + 1
    rows = [Row(number, 0, draws, draws) for number in range(count)]
    reason = refused(engine, rows, [Opening(number, GREEDY) for number in range(count)])
    assert f"{count * draws} draws" in reason


def test_penalties_are_not_drawn_for_guesses(kind: str, model: Path) -> None:
    engine, _ = loaded(kind, model)
    sampling = Sampling(presence_penalty=1.0)
    opening = Opening(1, sampling, history=history_of(sampling, [1, 2], 1))
    assert "penalties" in refused(engine, [Row(1, 0, 2, 2)], [opening])
    run(engine, [Row(1, 0, 2, 1)], [opening])
    assert "penalties" in refused(engine, [Row(1, 2, 2, 2)])


def test_positions_taken_back_do_not_count_as_capacity(kind: str, model: Path) -> None:
    engine = new_engine(kind)
    per_token = sum(load_backend(kind).describe(model).kv_bytes_per_token)
    kv_bytes = 2 * BLOCK_TOKENS * per_token
    spec = LoadSpec(path=str(model), start=0, end=LAYERS, kv_bytes=kv_bytes)
    info = engine.load(spec, lambda _: None)
    assert info.kv_tokens == 2 * BLOCK_TOKENS == 128
    run(engine, [Row(0, 0, 126, 4)], [Opening(0, GREEDY)])
    assert "129 positions" in refused(engine, [Row(0, 126, 3, 1)])
    run(engine, [Row(0, 123, 5, 5)])
    assert "129 positions" in refused(engine, [Row(0, 124, 5, 5)])


def test_windows_take_back_or_say_that_they_cannot(kind: str, tmp_path: Path) -> None:
    engine, trims = loaded(
        kind, make_tiny_model("gemma3_text", tmp_path / "gemma3", dtype="float32")
    )
    if trims:
        run(engine, [Row(1, 0, 30, 9)], [Opening(1, GREEDY)])
        run(engine, [Row(1, 25, 2, 1)])
    else:
        assert "take guesses back" in refused(engine, [Row(1, 0, 2, 2)], [Opening(1, GREEDY)])
        run(engine, [Row(1, 0, 2, 1)], [Opening(1, GREEDY)])
