"""Stages of a pipeline together compute what one stage does, however positions are cut up."""

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.backends import load_backend
from pxd.executors.protocol import Engine, LoadSpec, StageInfo, StepRejected
from pxd.models.describe import describe_checkpoint
from pxd.wire import Grant, Opening, Row, Sampling, Step, Tensor
from tests.executors.pipeline import GREEDY, Pipeline, new_engine
from tests.tiny_models import make_tiny_model

LAYERS = 6
PROMPT = list(range(30, 60))

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama")


def load(kind: str, path: Path, start: int, end: int) -> tuple[Engine, StageInfo]:
    engine = new_engine(kind)
    spec = LoadSpec(path=str(path), start=start, end=end, kv_bytes=1 << 26)
    return engine, engine.load(spec, lambda _: None)


def step(number: int, rows: Sequence[Row], tensor: Tensor, **more: Any) -> Step:
    return Step(pipeline="p", session=1, step=number, rows=tuple(rows), tensor=tensor, **more)


def opened(request: int, blocks: Sequence[int], **more: Any) -> dict[str, Any]:
    opening = Opening(request, Sampling(temperature=0, logprobs=5), **more)
    return {"openings": (opening,), "grants": (Grant(request, tuple(blocks)),)}


def test_any_cuts_and_chunks_give_the_same_tokens(kind: str, model: Path) -> None:
    whole = Pipeline.load(model, LAYERS, kinds=[kind])
    wanted = whole.generate(PROMPT, 10)
    assert len(set(wanted)) > 5
    for cuts in ([3], [1, 2, 5]):
        pipeline = Pipeline.load(model, LAYERS, cuts, kinds=[kind])
        for chunk in (2048, 1, 7):
            assert pipeline.generate(PROMPT, 10, chunk=chunk) == wanted


def test_requests_of_different_lengths_decode_together(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, [2], kinds=[kind])
    prompts = {
        n: [(n * 37 + i) % 200 for i in range(length)] for n, length in enumerate((1, 70, 9))
    }
    wanted = {n: pipeline.generate(prompt, 6, request=10 + n) for n, prompt in prompts.items()}
    for n, prompt in prompts.items():
        pipeline.prefill(n, prompt)
    texts = {n: list(prompt) for n, prompt in prompts.items()}
    for order in ((0, 1, 2), (2, 0, 1), (1, 2, 0), (1,), (0, 2), (1, 0, 2), (2, 1), (0, 1), (0, 2)):
        drawn = pipeline.step([(n, len(texts[n]) - 1, texts[n][-1:], True) for n in order])
        for n, token in zip(order, drawn, strict=True):
            texts[n].append(token)
    for n, prompt in prompts.items():
        made = texts[n][len(prompt) :]
        assert made[:6] == wanted[n][: len(made)]


def test_a_hidden_state_that_is_off_by_a_hundredth_shows(kind: str, model: Path) -> None:
    """Or equal tokens would say nothing of the numbers."""
    first, _ = load(kind, model, 0, 3)
    last, _ = load(kind, model, 3, LAYERS)
    tokens = np.array(PROMPT, "<i4")
    rows = [Row(1, 0, len(PROMPT), 1)]
    tensor, body = first.step(
        step(0, rows, Tensor("i32", (len(PROMPT),)), **opened(1, [0])), tokens.tobytes()
    )
    hidden = np.frombuffer(bytes(body), "<f4")

    def scores(number: int, factor: float) -> list[tuple[int, float]]:
        given = (hidden * np.float32(factor)).astype("<f4").tobytes()
        request = msgspec.structs.replace(rows[0], request=number)
        more = opened(number, [number])
        [drawn] = last.step(step(number, [request], tensor, **more), given)
        return list(drawn.logprobs.top)

    right = scores(1, 1.0)
    assert scores(2, 1.0) == right
    off = max(abs(a - b) for (_, a), (_, b) in zip(scores(3, 1.01), right, strict=True))
    assert off > 1e-5


def test_figures_of_a_stage(kind: str, model: Path) -> None:
    described = load_backend(kind).describe(model)
    checkpoint = describe_checkpoint(model)
    assert (described.layers, described.splits) == (LAYERS, (1, 2, 3, 4, 5))
    assert described.layer_bytes == checkpoint.layer_bytes
    # Two heads of 16 numbers, keys and values, in float32.
    assert described.kv_bytes_per_token == (2 * 2 * 16 * 4,) * LAYERS
    engine, info = load(kind, model, 1, 3)
    assert (info.layers, info.hidden_size, info.hidden_bytes) == (2, 64, 256)
    assert info.kv_tokens == (1 << 26) // (2 * 256)
    memory = engine.memory()
    assert memory.requests == 0
    assert memory.active >= sum(checkpoint.layer_bytes[1:3])
    assert memory.resident > 1 << 20


def test_the_device_is_measured(kind: str) -> None:
    device = load_backend(kind).measure()
    assert device.executors == (kind,)
    assert device.kind in ("cpu", "metal", "cuda", "rocm")
    assert device.name
    assert device.tflops > 0
    assert device.bandwidth > 0
    assert device.memory > 1 << 28


def test_another_session_forgets_all_requests(kind: str, model: Path) -> None:
    engine, _ = load(kind, model, 0, LAYERS)
    body = np.array(PROMPT, "<i4").tobytes()
    begun = step(0, [Row(1, 0, len(PROMPT), 0)], Tensor("i32", (len(PROMPT),)), **opened(1, [0]))
    engine.step(begun, body)
    later = step(1, [Row(1, len(PROMPT), 1, 1)], Tensor("i32", (1,)))
    with pytest.raises(StepRejected) as caught:
        engine.step(msgspec.structs.replace(later, session=2), body[:4])
    assert (caught.value.code, caught.value.requests) == ("unknown-request", (1,))
    assert engine.memory().requests == 0
    # Nor does the old session come back.
    with pytest.raises(StepRejected, match="not open"):
        engine.step(later, body[:4])


@pytest.mark.parametrize("cuts", [(), (2,)])
def test_a_request_begins_with_blocks_that_others_have_or_had(
    kind: str, model: Path, cuts: Sequence[int]
) -> None:
    bounds = [0, *cuts, LAYERS]
    loaded = [load(kind, model, a, b) for a, b in itertools.pairwise(bounds)]
    if not all(info.prefix_cache for _, info in loaded):
        pytest.skip(f"{kind} shares no prefixes")
    text = [(7 * i) % 250 for i in range(2 * BLOCK_TOKENS + 5)]
    numbers = iter(range(100))

    def run(rows: Sequence[Row], **more: Any) -> Any:
        fed = np.array([t for r in rows for t in text[r.position : r.position + r.count]], "<i4")
        given, body = step(next(numbers), rows, Tensor("i32", fed.shape), **more), fed.tobytes()
        output: Any = ()
        for engine, _ in loaded:
            output = engine.step(given, body)
            if engine is not loaded[-1][0]:
                given, body = msgspec.structs.replace(given, tensor=output[0]), bytes(output[1])
        return output

    whole, rest = len(text), len(text) - 2 * BLOCK_TOKENS
    [wanted] = run([Row(1, 0, whole, 1)], **opened(1, [4, 2, 9]))
    behind = [Row(2, 2 * BLOCK_TOKENS, rest, 1)]
    # From a request that goes on, into blocks of its own, numbered the other way round.
    shared = opened(2, [2 + 3, 1, 0], cached=2 * BLOCK_TOKENS, hits=(4, 2))
    assert run(behind, **shared)[0].token == wanted.token
    # From one that has ended, one block staying where it is.
    rows = [Row(3, 2 * BLOCK_TOKENS, rest, 1)]
    stays = opened(3, [4, 7, 8], cached=2 * BLOCK_TOKENS, hits=(4, 2))
    assert run(rows, releases=(1,), **stays)[0].token == wanted.token
    # Block 2 is now given to another text; what was in it cannot be used any more.
    run([Row(4, 0, 3, 0)], **opened(4, [2]))
    gone = opened(5, [10, 11, 12], cached=2 * BLOCK_TOKENS, hits=(4, 2))
    with pytest.raises(StepRejected) as caught:
        run([Row(5, 2 * BLOCK_TOKENS, rest, 1)], **gone)
    assert (caught.value.code, caught.value.requests) == ("bad-step", (5,))


def test_blocks_that_come_back_take_no_more_memory(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, kinds=[kind])
    [engine] = pipeline.engines
    held = []
    for _ in range(6):
        pipeline.prefill(1, [5] * 400)
        assert engine.memory().requests == 1
        pipeline.release([1])
        assert engine.memory().requests == 0
        held.append(engine.memory().active)
    assert max(held[1:]) <= held[1] + 400 * 4


def test_greedy_is_the_same_with_log_probabilities(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, [3], kinds=[kind])
    wanted = pipeline.generate(PROMPT, 3)
    assert pipeline.generate(PROMPT, 3) == wanted
    pipeline.prefill(1, PROMPT, samplings={1: Sampling(temperature=0, logprobs=3)})
    [drawn] = pipeline.step([(1, len(PROMPT) - 1, PROMPT[-1:], True)])
    assert drawn.token == wanted[0] == drawn.logprobs.top[0][0]
    assert drawn.logprobs.token == drawn.logprobs.top[0][1]
    assert GREEDY.logprobs is None
