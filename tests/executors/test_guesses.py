"""The MLX engine with rows of several draws: what it draws, takes back, and refuses."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pxd.engine.history import history_of
from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec, Scored, StepRejected
from pxd.wire import MAX_DRAWS, MAX_GUESSES, Opening, Row, Sampling, Step, Tensor
from tests.executors.pipeline import GREEDY, Pipeline
from tests.tiny_models import make_tiny_model

LAYERS = 6
PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "qwen3"
    return make_tiny_model("qwen3", directory, dtype="float32")


@pytest.mark.parametrize("cuts", [(), (3,), (2, 4)])
@pytest.mark.parametrize("temperature", [0.0, 0.9])
def test_several_draws_are_those_of_as_many_steps(
    model: Path, cuts: Sequence[int], temperature: float
) -> None:
    sampling = {1: Sampling(temperature=temperature, seed=7)}
    pipeline = Pipeline.load(model, LAYERS, cuts)
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


def test_who_guesses_and_who_does_not_share_a_step(model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, (3,))
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


def test_each_draw_has_its_log_probabilities(model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS)
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


def loaded(path: Path) -> tuple[MlxEngine, bool]:
    engine = MlxEngine()
    info = engine.load(LoadSpec(path=str(path), start=0, end=LAYERS), lambda _: None)
    return engine, info.trims


def run(engine: MlxEngine, rows: Sequence[Row], openings: Sequence[Opening] = ()) -> object:
    count = sum(row.count for row in rows)
    step = Step(
        pipeline="p",
        session=0,
        step=0,
        rows=tuple(rows),
        tensor=Tensor("i32", (count,)),
        openings=tuple(openings),
    )
    return engine.step(step, np.ones(count, "<i4").tobytes())


def refused(engine: MlxEngine, rows: Sequence[Row], openings: Sequence[Opening] = ()) -> str:
    with pytest.raises(StepRejected) as caught:
        run(engine, rows, openings)
    assert caught.value.code == "bad-step"
    return str(caught.value)


def test_only_guesses_are_taken_back_and_only_once(model: Path) -> None:
    engine, trims = loaded(model)
    assert trims
    run(engine, [Row(1, 0, 4, 0)], [Opening(1, GREEDY)])
    assert "goes on at 3" in refused(engine, [Row(1, 3, 1, 1)])
    run(engine, [Row(1, 4, 4, 3)])
    assert "goes on at 5" in refused(engine, [Row(1, 5, 1, 1)])
    run(engine, [Row(1, 6, 1, 1)])
    assert "goes on at 6" in refused(engine, [Row(1, 6, 1, 1)])
    run(engine, [Row(1, 7, 1, 1)])


def test_too_many_draws_are_refused(model: Path) -> None:
    engine, _ = loaded(model)
    draws = 1 + MAX_GUESSES
    count = MAX_DRAWS // draws + 1
    rows = [Row(number, 0, draws, draws) for number in range(count)]
    reason = refused(engine, rows, [Opening(number, GREEDY) for number in range(count)])
    assert f"{count * draws} draws" in reason


def test_penalties_are_not_drawn_for_guesses(model: Path) -> None:
    engine, _ = loaded(model)
    sampling = Sampling(presence_penalty=1.0)
    opening = Opening(1, sampling, history=history_of(sampling, [1, 2], 1))
    assert "penalties" in refused(engine, [Row(1, 0, 2, 2)], [opening])
    run(engine, [Row(1, 0, 2, 1)], [opening])
    assert "penalties" in refused(engine, [Row(1, 2, 2, 2)])


def test_positions_taken_back_do_not_count_as_capacity(model: Path) -> None:
    engine = MlxEngine()
    per_token = sum(describe(model).kv_bytes_per_token)
    spec = LoadSpec(path=str(model), start=0, end=LAYERS, kv_bytes=10 * per_token)
    info = engine.load(spec, lambda _: None)
    assert info.kv_tokens == 10
    run(engine, [Row(1, 0, 8, 4)], [Opening(1, GREEDY)])
    assert "11 positions" in refused(engine, [Row(1, 8, 3, 1)])
    run(engine, [Row(1, 5, 5, 5)])
    assert "11 positions" in refused(engine, [Row(1, 6, 5, 5)])


def test_a_model_with_windows_cannot_take_back(tmp_path: Path) -> None:
    engine, trims = loaded(make_tiny_model("gemma3_text", tmp_path / "gemma3", dtype="float32"))
    assert not trims
    assert "take guesses back" in refused(engine, [Row(1, 0, 2, 2)], [Opening(1, GREEDY)])
    run(engine, [Row(1, 0, 2, 1)], [Opening(1, GREEDY)])
