"""What only the MLX engine does, on one tiny model: see `tests/executors/contract` for the rest."""

from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx_lm
import numpy as np
import pytest

from pxd.executors.mlx import passes
from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec
from pxd.wire import Opening, Row, Sampling, Step, Tensor
from tests.executors.pipeline import GREEDY, Pipeline
from tests.tiny_models import make_tiny_model

LAYERS = 6
PROMPT = list(range(30, 50))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


def test_releasing_gives_the_memory_back(model: Path) -> None:
    engine = MlxEngine()
    engine.load(LoadSpec(path=str(model), start=0, end=LAYERS), lambda _: None)
    before = engine.memory().active
    step = Step(
        pipeline="p",
        session=0,
        step=0,
        rows=(Row(1, 0, 900, 0),),
        tensor=Tensor("i32", (900,)),
        openings=(Opening(1, GREEDY),),
    )
    engine.step(step, np.ones(900, "<i4").tobytes())
    held = engine.memory().active - before
    assert held >= 900 * sum(describe(model).kv_bytes_per_token)
    engine.release((1, 2, 3))
    assert engine.memory().active - before < held / 10


@pytest.mark.parametrize("cuts", [(), (2, 4)])
def test_a_long_prompt_is_taken_in_pieces(
    model: Path, cuts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = Pipeline.load(model, LAYERS, cuts).generate(PROMPT, 8)
    hidden = describe(model).hidden_size
    # The last piece of all but one of the prompt's tokens sees 19 positions: 5 at a time.
    monkeypatch.setattr(passes, "MOST_SCORES", 5 * 19 * hidden)
    pieces: list[int] = []

    class Counted(passes.Pass):
        def __init__(self, parts: list[passes.Part], *more: Any) -> None:
            super().__init__(parts, *more)
            pieces.extend(part.end - part.begin for part in parts)

    monkeypatch.setattr(passes, "Pass", Counted)
    assert Pipeline.load(model, LAYERS, cuts).generate(PROMPT, 8) == whole
    assert pieces[:5] == ([5, 5, 5, 4, 1] if not cuts else [5, 5, 5, 4, 5])


def test_a_greedy_token_is_the_same_with_its_log_probabilities(model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, [3])
    wanted = pipeline.generate(PROMPT, 4)
    pipeline.prefill(1, PROMPT, samplings={1: Sampling(temperature=0, logprobs=3)})
    sequence = list(PROMPT)
    whole = mlx_lm.load(str(model))[0]
    for token in wanted:
        [drawn] = pipeline.step([(1, len(sequence) - 1, sequence[-1:], True)])
        logits = np.array(whole(mx.array([sequence]))[0, -1].astype(mx.float32)).astype(float)
        expected = logits - np.log(np.exp(logits - logits.max()).sum()) - logits.max()
        assert drawn.token == token == drawn.logprobs.top[0][0]
        assert drawn.logprobs.token == drawn.logprobs.top[0][1]
        # Prefilled in one piece, in the model's bfloat16, other roundings come out.
        assert drawn.logprobs.token == pytest.approx(expected[token], abs=0.05)
        assert [value for _, value in drawn.logprobs.top] == pytest.approx(
            sorted(expected, reverse=True)[:3], abs=0.05
        )
        sequence.append(token)
