"""An engine on one tiny model: what it refuses, what survives that, and what it holds."""

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import msgspec
import numpy as np
import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.history import history_of
from pxd.executors.backends import load_backend
from pxd.executors.protocol import Engine, ExecutorError, LoadSpec, Scored, StepRejected
from pxd.models.describe import describe_checkpoint
from pxd.wire import Coding, Grant, History, Opening, Row, Sampling, Step, Tensor
from tests.executors.pipeline import GREEDY, Pipeline, granted, new_engine
from tests.tiny_models import VOCABULARY, make_tiny_model

LAYERS = 6
PROMPT = list(range(30, 50))
Editor = Callable[[dict[str, mx.array]], dict[str, mx.array]]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("models") / "qwen3")


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Untied, so that both ends have tensors of their own; layers lie in different files."""
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama", shards=8)


def load(kind: str, path: Path, start: int = 0, end: int = LAYERS, **options: Any) -> Engine:
    engine = new_engine(kind)
    engine.load(LoadSpec(path=str(path), start=start, end=end, **options), lambda _: None)
    return engine


def make_step(
    rows: Sequence[Row], tensor: Tensor, openings: Sequence[int] = (), releases: Sequence[int] = ()
) -> Step:
    """Of session 0. Requests that open get two blocks of KV."""
    return Step(
        pipeline="p",
        session=0,
        step=0,
        rows=tuple(rows),
        tensor=tensor,
        openings=tuple(Opening(number, GREEDY) for number in openings),
        grants=tuple(map(granted, dict.fromkeys(openings))),
        releases=tuple(releases),
    )


def tokens(count: int, value: int = 1) -> tuple[Tensor, bytes]:
    return Tensor("i32", (count,)), value.to_bytes(4, "little", signed=True) * count


def rejected(engine: Engine, step: Step, body: bytes) -> StepRejected:
    with pytest.raises(StepRejected) as caught:
        engine.step(step, body)
    return caught.value


def edited_copy(source: Path, target: Path, edit: Editor) -> Path:
    shutil.copytree(source, target)
    file = str(target / "model.safetensors")
    mx.save_safetensors(file, edit(dict(mx.load(file))), metadata={"format": "mlx"})
    return target


@pytest.mark.parametrize(
    ("rows", "openings", "code", "names"),
    [
        ([Row(9, 0, 1, 1)], [], "unknown-request", (9,)),
        ([Row(1, 3, 1, 1)], [], "bad-step", (1,)),
        ([Row(1, 5, 1, 1)], [], "bad-step", (1,)),
        ([Row(2, 1, 1, 1)], [2], "bad-step", (2,)),
        ([Row(1, 4, 1, 1)], [1], "bad-step", (1,)),
        ([Row(2, 0, 1, 1)], [2, 2], "bad-step", (2,)),
        ([Row(1, 4, 1, 1), Row(1, 5, 1, 1)], [], "bad-step", (1,)),
        ([Row(1, 4, 1, 0), Row(1, 4, 1, 1)], [], "bad-step", (1,)),
        ([Row(1, 4, 2, 3)], [], "bad-step", (1,)),
        ([Row(1, 4, 2, 2), Row(1, 5, 1, 1)], [], "bad-step", (1,)),
    ],
)
def test_a_step_that_does_not_fit_is_rejected_and_harms_nobody(
    kind: str, model: Path, rows: list[Row], openings: list[int], code: str, names: tuple[int, ...]
) -> None:
    engine = load(kind, model)
    tensor, body = tokens(4)
    engine.step(make_step([Row(1, 0, 4, 0)], tensor, [1]), body)
    tensor, body = tokens(sum(row.count for row in rows))
    error = rejected(engine, make_step(rows, tensor, openings), body)
    assert (error.code, error.requests) == (code, names)
    assert engine.memory().requests == 1
    tensor, body = tokens(1)
    assert len(engine.step(make_step([Row(1, 4, 1, 1)], tensor), body)) == 1


@pytest.mark.parametrize("token", [-1, VOCABULARY, 2**31 - 1])
def test_token_ids_outside_the_vocabulary_are_rejected(kind: str, model: Path, token: int) -> None:
    tensor, body = tokens(2, token)
    error = rejected(load(kind, model), make_step([Row(1, 0, 2, 1)], tensor, [1]), body)
    assert (error.code, error.requests) == ("bad-step", (1,))


@pytest.mark.parametrize(
    "tensor", [Tensor("f32", (2, 63)), Tensor("f32", (3, 64)), Tensor("i32", (2, 64))]
)
def test_hidden_states_of_another_shape_or_type_are_rejected(
    kind: str, model: Path, tensor: Tensor
) -> None:
    engine = load(kind, model, 2, 4)
    step = make_step([Row(1, 0, 2, 0)], tensor, [1])
    assert rejected(engine, step, bytes(tensor.nbytes)).code == "bad-step"


@pytest.mark.parametrize("coding", ["fp8", "int8"])
@pytest.mark.parametrize("scale", [float("nan"), float("inf"), -1.0])
def test_scales_that_are_none_are_rejected_and_harm_nobody(
    kind: str, model: Path, coding: Coding, scale: float
) -> None:
    engine = load(kind, model, 2, 4)
    tensor = Tensor("f32", (2, 64), coding)
    body = np.array([1, scale], "<f4").tobytes() + bytes(128)
    error = rejected(engine, make_step([Row(1, 0, 2, False)], tensor, [1]), body)
    assert (error.code, error.requests) == ("bad-step", (1,))
    body = np.array([1, 0], "<f4").tobytes() + bytes(128)
    engine.step(make_step([Row(1, 0, 2, False)], tensor, [1]), body)
    assert engine.memory().requests == 1


def test_hidden_states_are_coded_as_was_said_last(kind: str, model: Path) -> None:
    engine = load(kind, model, 0, 2)
    tensor, body = tokens(2)
    sent: list[Tensor] = []
    for position, coding in enumerate([None, "fp8", "int8", None]):
        engine.send_as(coding)
        opened = [] if position else [1]
        step = make_step([Row(1, 2 * position, 2, False)], tensor, opened)
        sent.append(engine.step(step, body)[0])
    assert sent == [Tensor("f32", (2, 64), coding) for coding in (None, "fp8", "int8", None)]


def test_a_step_beyond_the_kv_budget_is_rejected(kind: str, model: Path) -> None:
    engine = new_engine(kind)
    per_token = sum(load_backend(kind).describe(model).kv_bytes_per_token)
    info = engine.load(
        LoadSpec(path=str(model), start=0, end=LAYERS, kv_bytes=per_token * 128), lambda _: None
    )
    assert info.kv_tokens == 128
    tensor, body = tokens(100)
    engine.step(make_step([Row(0, 0, 100, 0)], tensor, [0]), body)
    step = make_step([Row(1, 0, 100, 0)], tensor, [1])
    assert rejected(engine, step, body).code == "bad-step"
    assert engine.memory().requests == 1
    same_blocks = msgspec.structs.replace(step, grants=(Grant(1, (0, 1)),), releases=(0,))
    assert engine.step(same_blocks, body) == ()


def test_nothing_runs_before_a_load(kind: str) -> None:
    tensor, body = tokens(1)
    step = make_step([Row(1, 0, 1, 1)], tensor, [1])
    assert rejected(new_engine(kind), step, body).code == "not-ready"


def test_a_step_without_rows_releases_and_answers(kind: str, model: Path) -> None:
    tensor, body = tokens(4)
    empty = make_step([], Tensor("i32", (0,)), releases=[1, 99])
    for engine, answer in (
        (load(kind, model), ()),
        (load(kind, model, 0, 3), (Tensor("i32", (0,)), b"")),
    ):
        engine.step(make_step([Row(1, 0, 4, 0)], tensor, [1]), body)
        assert engine.memory().requests == 1
        assert engine.step(empty, b"") == answer
        assert engine.memory().requests == 0


def test_it_tells_what_it_holds_and_what_it_keeps(kind: str, model: Path) -> None:
    engine = load(kind, model)
    tensor, body = tokens(BLOCK_TOKENS + 1)
    engine.step(make_step([Row(0, 0, BLOCK_TOKENS + 1, 0)], tensor, [0]), body)
    assert (engine.memory().held, engine.memory().kept) == (2, 0)
    engine.step(make_step([], Tensor("i32", (0,)), releases=[0]), b"")
    assert (engine.memory().held, engine.memory().kept) == (0, 2)
    # Its blocks are given to another one, so nothing of it can be asked for.
    step = make_step([Row(2, 0, BLOCK_TOKENS + 1, 0)], tensor, [2])
    engine.step(msgspec.structs.replace(step, grants=(Grant(2, (0, 1)),)), body)
    assert (engine.memory().held, engine.memory().kept) == (2, 0)


def test_one_step_may_fill_and_decode_and_mix_requests(kind: str, model: Path) -> None:
    pipeline = Pipeline.load(model, LAYERS, [2], kinds=[kind])
    wanted = {number: pipeline.generate(PROMPT[number:], 1) for number in (1, 2, 3)}
    pipeline.prefill(3, PROMPT[3:])
    got = pipeline.step(
        [
            (1, 0, PROMPT[1:8], False),
            (3, len(PROMPT) - 4, PROMPT[-1:], True),
            (2, 0, PROMPT[2:], True),
            (1, 7, PROMPT[8:-1], False),
            (1, len(PROMPT) - 2, PROMPT[-1:], True),
        ]
    )
    assert list(got) == wanted[3] + wanted[2] + wanted[1]


def test_sampling_is_the_same_alone_in_a_batch_and_in_any_split(kind: str, model: Path) -> None:
    samplings = {
        1: Sampling(temperature=0.9, seed=5),
        2: Sampling(temperature=1.2, top_p=0.9, seed=6),
        3: Sampling(temperature=0.7, top_k=20, seed=7),
        4: GREEDY,
    }

    def run(cuts: list[int], groups: list[list[int]]) -> dict[int, list[int]]:
        pipeline = Pipeline.load(model, LAYERS, cuts, kinds=[kind])
        sequences = {number: PROMPT[number:] for number in samplings}
        for number in samplings:
            pipeline.prefill(number, sequences[number], samplings=samplings)
        for _ in range(6):
            for group in groups:
                rows = [(n, len(sequences[n]) - 1, sequences[n][-1:], True) for n in group]
                for number, token in zip(group, pipeline.step(rows), strict=True):
                    sequences[number].append(token)
        return sequences

    alone = run([], [[1], [2], [3], [4]])
    assert run([], [[1, 2, 3, 4]]) == alone
    assert run([1, 4], [[4, 2], [3, 1]]) == alone


PENALTIES = {
    1: Sampling(temperature=0, repetition_penalty=0.4),
    2: Sampling(temperature=0.9, presence_penalty=-2, frequency_penalty=-1, seed=8),
    3: Sampling(temperature=1.1, min_p=0.1, repetition_penalty=0.5, logit_bias=((3, 2.0),), seed=9),
    4: Sampling(temperature=0, frequency_penalty=-2, logprobs=2),
}


def test_penalties_are_the_same_alone_in_a_batch_and_after_an_opening_in_the_middle(
    kind: str,
    model: Path,
) -> None:
    def run(groups: list[list[int]], again_at: int = -1) -> dict[int, list[int]]:
        pipeline = Pipeline.load(model, LAYERS, [2], kinds=[kind])
        sequences = {number: PROMPT[number:] for number in PENALTIES}

        def begin(number: int) -> None:
            tokens, prompt = sequences[number], len(PROMPT) - number
            history = history_of(PENALTIES[number], tokens, prompt)
            pipeline.prefill(number, tokens, samplings=PENALTIES, histories={number: history})

        for number in PENALTIES:
            begin(number)
        for count in range(12):
            if count == again_at:
                pipeline.release(list(PENALTIES))
                for number in PENALTIES:
                    begin(number)
            for group in groups:
                rows = [(n, len(sequences[n]) - 1, sequences[n][-1:], True) for n in group]
                for number, drawn in zip(group, pipeline.step(rows), strict=True):
                    sequences[number].append(drawn.token if isinstance(drawn, Scored) else drawn)
        return sequences

    alone = run([[1], [2], [3], [4]])
    assert run([[1, 2, 3, 4]]) == alone
    assert run([[4, 2], [3, 1]], again_at=7) == alone
    plain = Pipeline.load(model, LAYERS, kinds=[kind])
    for number in (1, 4):
        assert alone[number] != PROMPT[number:] + plain.generate(PROMPT[number:], 12)


def test_tokens_that_do_not_exist_are_of_no_consequence(kind: str, model: Path) -> None:
    """They may come from any head; the vocabulary is this stage's."""
    pipeline = Pipeline.load(model, LAYERS, kinds=[kind])
    wanted = pipeline.generate(PROMPT, 2)
    odd = Sampling(
        temperature=0,
        repetition_penalty=1.000001,
        logit_bias=(((1 << 31) - 1, 5.0),),
        barred=((1 << 31) - 1,),
        min_length=1000,
    )
    history = History(prompt=((1 << 31) - 1,) * 3, answer=((1 << 31) - 1,))
    pipeline.prefill(1, PROMPT, samplings={1: odd}, histories={1: history})
    assert list(pipeline.step([(1, len(PROMPT) - 1, PROMPT[-1:], True)])) == wanted[:1]


def test_logits_that_are_not_finite_end_the_step_but_not_the_engine(
    kind: str, model: Path, tmp_path: Path
) -> None:
    def poison(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        table = weights["model.embed_tokens.weight"]
        table[7] = float("nan")
        return weights

    # Tied weights would put the NaN into everybody's logits.
    path = edited_copy(
        model,
        tmp_path / "poisoned",
        lambda w: poison({**w, "lm_head.weight": mx.array(w["model.embed_tokens.weight"])}),
    )
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": False}))
    pipeline = Pipeline.load(path, LAYERS, kinds=[kind])
    wanted = pipeline.generate(PROMPT, 3)
    pipeline.prefill(1, PROMPT)
    pipeline.prefill(2, [7, 8, 9])
    with pytest.raises(StepRejected) as caught:
        pipeline.step([(2, 2, [9], True)])
    assert caught.value.code == "not-finite"
    assert caught.value.requests == (2,)
    assert "the logits of requests (2,) are not finite" in caught.value.reason
    assert list(pipeline.step([(1, len(PROMPT) - 1, PROMPT[-1:], True)])) == wanted[:1]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_hidden_states_that_are_not_finite_are_named_where_they_arise(
    kind: str, model: Path, tmp_path: Path, bad: float
) -> None:
    def poison(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        weights["model.layers.3.mlp.down_proj.weight"][5, 7] = bad
        return weights

    path = edited_copy(model, tmp_path / "poisoned", poison)
    pipeline = Pipeline.load(path, LAYERS, cuts=[2, 4], kinds=[kind])
    for rows in ([(1, 0, PROMPT, 0)], [(2, 0, [9], 1)], [(3, 0, [4, 5], 2)]):
        with pytest.raises(StepRejected) as caught:
            pipeline.step(rows)
        assert caught.value.code == "not-finite"
        assert caught.value.requests == (rows[0][0],)
        assert "layers [2, 4): NotFinite: the hidden states" in caught.value.reason


def where_a_step_runs(kind: str) -> tuple[Any, str]:
    """A class and its method."""
    if kind == "mlx":
        from pxd.executors.mlx.passes import Passes

        return Passes, "run"
    from pxd.executors.torch.stage import Stage

    return Stage, "forward"


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out-of-memory"),
        (RuntimeError("[malloc] Unable to allocate 17179869184 bytes."), "out-of-memory"),
        (RuntimeError("[metal::malloc] Attempting to allocate 9 bytes"), "out-of-memory"),
        (RuntimeError("cudaMallocAsync failed: out of memory"), "out-of-memory"),
        (RuntimeError("DefaultCPUAllocator: can't allocate memory"), "out-of-memory"),
        (RuntimeError("[matmul] shapes do not match"), "executor-failed"),
        (ValueError("out of memory"), "executor-failed"),
    ],
)
def test_a_step_without_memory_says_so_and_frees_what_it_had(
    kind: str, model: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, code: str
) -> None:
    pipeline = Pipeline.load(model, LAYERS, kinds=[kind])
    wanted = pipeline.generate(PROMPT, 3)
    pipeline.prefill(7, PROMPT)

    def fail(*_: object) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(*where_a_step_runs(kind), fail)
        with pytest.raises(StepRejected) as caught:
            pipeline.step([(7, len(PROMPT) - 1, PROMPT[-1:], True)])
    assert (caught.value.code, caught.value.requests) == (code, (7,))
    [engine] = pipeline.engines
    assert engine.memory().requests == 0
    assert pipeline.generate(PROMPT, 3) == wanted


def test_only_own_layers_take_memory(kind: str, model: Path) -> None:
    description = load_backend(kind).describe(model)
    engine = new_engine(kind)
    info = engine.load(LoadSpec(path=str(model), start=2, end=4), lambda _: None)
    # A few small arrays (frequencies, scalars) belong to no tensor of the checkpoint.
    assert sum(description.layer_bytes[2:4]) <= info.weight_bytes
    assert info.weight_bytes < sum(description.layer_bytes[2:4]) + 4096
    assert info.layers == 2
    assert info.hidden_size == 64


def test_progress_grows_to_one(kind: str, model: Path) -> None:
    seen: list[float] = []
    new_engine(kind).load(LoadSpec(path=str(model), start=0, end=LAYERS), seen.append)
    assert seen == sorted(seen)
    assert seen[-1] == 1.0


def test_a_stage_loads_with_only_its_own_files(kind: str, sharded: Path, tmp_path: Path) -> None:
    wanted = Pipeline.load(sharded, LAYERS, kinds=[kind]).generate(PROMPT, 4)
    checkpoint = describe_checkpoint(sharded)
    engines = []
    for start, end in ((0, 2), (2, 4), (4, 6)):
        part = tmp_path / f"{start}"
        part.mkdir()
        needed = {*checkpoint.files_for(start, end)}
        for file in sharded.iterdir():
            if file.suffix != ".safetensors" or file.name in needed:
                shutil.copy(file, part)
        assert len(list(part.glob("*.safetensors"))) < 8
        assert describe_checkpoint(part).fingerprint == checkpoint.fingerprint
        engines.append(load(kind, part, start, end, fingerprint=checkpoint.fingerprint))
    assert Pipeline(engines).generate(PROMPT, 4) == wanted
    with pytest.raises(ExecutorError, match=r"lacks model-0000.*fetch the model again"):
        load(kind, tmp_path / "0", 2, 4)


def test_refused_loads_say_why_and_may_be_followed_by_a_right_one(
    kind: str, model: Path, tmp_path: Path
) -> None:
    engine = new_engine(kind)

    def refused(path: Path, start: int = 0, end: int = LAYERS, fingerprint: str = "") -> str:
        spec = LoadSpec(path=str(path), start=start, end=end, fingerprint=fingerprint)
        with pytest.raises(ExecutorError) as caught:
            engine.load(spec, lambda _: None)
        return str(caught.value)

    assert "another model" in refused(model, fingerprint="0" * 64)
    assert "no layers [3, 9)" in refused(model, 3, 9)
    assert "no layers [3, 3)" in refused(model, 3, 3)
    assert "no directory" in refused(tmp_path / "nowhere")

    def without(name: str) -> Editor:
        return lambda weights: {key: value for key, value in weights.items() if name not in key}

    lacking = edited_copy(model, tmp_path / "lacking", without("layers.3.mlp.up_proj"))
    assert "lacks model.layers.3.mlp.up_proj.weight" in refused(lacking)
    engine.load(LoadSpec(path=str(lacking), start=0, end=3), lambda _: None)
    assert "holds a stage already" in refused(model)


def test_a_missing_end_of_the_model_is_noticed_where_it_is_needed(
    kind: str, model: Path, tmp_path: Path
) -> None:
    path = edited_copy(
        model,
        tmp_path / "endless",
        lambda weights: {k: v for k, v in weights.items() if "embed_tokens" not in k},
    )
    load(kind, path, 2, 4)
    for start, end in ((0, 3), (3, 6)):
        with pytest.raises(ExecutorError, match=r"lacks .*model\.embed_tokens\.weight"):
            load(kind, path, start, end)


def test_tensors_of_the_wrong_shape_are_noticed(kind: str, model: Path, tmp_path: Path) -> None:
    def widen(weights: dict[str, mx.array]) -> dict[str, mx.array]:
        name = "model.layers.1.mlp.up_proj.weight"
        return {**weights, name: mx.concatenate([weights[name]] * 2)}

    path = edited_copy(model, tmp_path / "wide", widen)
    with pytest.raises(ExecutorError, match=r"wrong shape: model\.layers\.1\.mlp"):
        load(kind, path, 0, 3)


def test_a_truncated_file_is_noticed(kind: str, model: Path, tmp_path: Path) -> None:
    shutil.copytree(model, tmp_path / "cut")
    file = tmp_path / "cut" / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    with pytest.raises(ExecutorError, match="damaged or incomplete"):
        load(kind, tmp_path / "cut", 0, 3)
