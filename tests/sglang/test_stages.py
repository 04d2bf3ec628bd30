"""SGLang stages on a CPU, in float32, against transformers' own code for the whole model.

This proves how models are split, loaded, paged and batched, and nothing about CUDA.
"""

import itertools
import random
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from pxd.engine.blocks import blocks_for
from pxd.engine.scheduler import NewRequest
from pxd.executors.protocol import ExecutorError, LoadSpec, Scored, StepRejected
from pxd.wire import Grant, Opening, Row, Sampling, Step, Tensor
from tests.executors.test_under_load import Knowing
from tests.sglang.remote import RemoteEngine, opened
from tests.sglang.stages import KV_BYTES, LAYERS, Reference, Stages, pipeline
from tests.tiny_models import VOCABULARY
from tests.torch_models import make_torch_model

PROMPT = list(range(30, 50))
GREEDY = Sampling(temperature=0)
SCORED = Sampling(temperature=0, logprobs=5)


class Case(NamedTuple):
    path: Path
    stages: Stages
    reference: Reference


@pytest.fixture(
    scope="module",
    params=[("llama", ()), ("llama", (2, 4)), ("qwen3", (3,)), ("qwen3_moe", (2,))],
    ids=lambda param: f"{param[0]}-{len(param[1]) + 1}",
)
def case(request: Any, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Case]:
    architecture, cuts = request.param
    path = make_torch_model(architecture, tmp_path_factory.mktemp("models") / architecture)
    with pipeline(path, cuts) as stages:
        yield Case(path, stages, Reference(path))


def requests_of(dice: random.Random, count: int) -> list[NewRequest]:
    """Ragged ones, some of which begin alike."""
    families = [[dice.randrange(VOCABULARY) for _ in range(150)] for _ in range(2)]
    return [
        NewRequest(
            number=number,
            tokens=[
                *dice.choice(families)[: dice.choice([0, 64, 100, 128, 150])],
                *(dice.randrange(VOCABULARY) for _ in range(dice.randint(1, 40))),
            ],
            max_new=dice.randint(1, 12),
            sampling=GREEDY,
        )
        for number in range(count)
    ]


class Direct:
    """Steps as no scheduler makes them, with blocks taken one after the other."""

    def __init__(self, stages: Stages) -> None:
        self.stages = stages
        stages.session += 1
        self.numbers, self.blocks = itertools.count(), itertools.count()
        self.granted: dict[int, int] = {}

    def step(
        self,
        rows: Sequence[tuple[int, int, Sequence[int], int]],
        sampling: Sampling = GREEDY,
        releases: Sequence[int] = (),
        grants: Sequence[Grant] | None = None,
    ) -> tuple[Any, ...]:
        """Run rows of (request, position, tokens, draws)."""
        return self.stages.step(*self.made(rows, sampling, releases, grants))

    def made(
        self,
        rows: Sequence[tuple[int, int, Sequence[int], int]],
        sampling: Sampling = GREEDY,
        releases: Sequence[int] = (),
        grants: Sequence[Grant] | None = None,
    ) -> tuple[Step, bytes]:
        new = [r for r in dict.fromkeys(row[0] for row in rows) if r not in self.granted]
        tokens = np.array([token for row in rows for token in row[2]], "<i4")
        made = []
        for request, position, some, _ in rows:
            has = self.granted.setdefault(request, 0)
            wanted = max(0, blocks_for(position + len(some)) - has)
            made.append(Grant(request, tuple(next(self.blocks) for _ in range(wanted))))
            self.granted[request] += wanted
        step = Step(
            pipeline="p",
            session=self.stages.session,
            step=next(self.numbers),
            rows=tuple(Row(r, position, len(some), draws) for r, position, some, draws in rows),
            tensor=Tensor("i32", tokens.shape),
            openings=tuple(Opening(number, sampling) for number in new),
            grants=tuple(made if grants is None else grants),
            releases=tuple(releases),
        )
        return step, tokens.tobytes()

    def rejected(self, *args: Any, **options: Any) -> StepRejected:
        with pytest.raises(StepRejected) as caught:
            self.step(*args, **options)
        return caught.value


def test_answers_are_those_of_transformers(case: Case) -> None:
    assert Direct(case.stages).step([(1, 0, PROMPT, 1)]) == tuple(case.reference.answer(PROMPT, 1))
    requests = requests_of(random.Random(1), 6)
    wanted = {r.number: case.reference.answer(r.tokens, r.max_new) for r in requests}
    assert case.stages.serve(requests, prefill_chunk=37, step_tokens=64) == wanted
    texts = [[*r.tokens, *wanted[r.number]] for r in requests]
    knowing = Knowing(texts, random.Random(2))
    assert case.stages.serve(requests, knowing, max_running=4) == wanted
    assert 0 < knowing.right < knowing.guessed


def test_logits_are_those_of_transformers_at_any_chunk_boundary(case: Case) -> None:
    wanted = torch.log_softmax(case.reference.logits(PROMPT), dim=-1)[-1]
    for first in (1, 7, 19):
        direct = Direct(case.stages)
        direct.step([(1, 0, PROMPT[:first], 0)])
        (drawn,) = direct.step([(1, first, PROMPT[first:], 1)], SCORED)
        assert isinstance(drawn, (int, Scored))
    direct = Direct(case.stages)
    (drawn,) = direct.step([(1, 0, PROMPT, 1)], SCORED)
    for token, logprob in drawn.logprobs.top:
        assert logprob == pytest.approx(float(wanted[token]), abs=1e-3)


def test_a_hidden_state_that_is_a_little_off_changes_the_logits(case: Case) -> None:
    first, *rest = case.stages.engines
    if not rest:
        pytest.skip("there is nothing between the stages")
    scores = []
    for factor in (1.0, 1.0, 1.01):
        step, body = Direct(case.stages).made([(1, 0, PROMPT, 1)], SCORED)
        tensor, hidden = first.step(step, body)
        body = (np.frombuffer(hidden, "<f4") * np.float32(factor)).tobytes()
        step = msgspec.structs.replace(step, tensor=tensor)
        (drawn,) = Stages(rest, 0).step(step, body)
        scores.append(drawn.logprobs.top)
    assert scores[0] == scores[1] != scores[2]


def test_draws_depend_on_nothing_but_seed_and_position(case: Case) -> None:
    requests = [
        msgspec.structs.replace(
            request, sampling=Sampling(temperature=0.9, top_p=0.95, seed=request.number)
        )
        for request in requests_of(random.Random(3), 5)
    ]
    together = case.stages.serve(requests)
    assert together == case.stages.serve(requests[::-1], prefill_chunk=16, max_running=2)
    alone = [case.stages.serve([request])[request.number] for request in requests]
    assert list(together.values()) == alone


def test_what_does_not_fit_is_refused_and_harms_nobody(case: Case) -> None:
    direct = Direct(case.stages)
    wanted = case.reference.answer(PROMPT, 2)
    direct.step([(1, 0, PROMPT[:-1], 0)])
    for reason, rows, grants in (
        ("goes on at 18", [(1, 18, [1], 1)], None),
        ("goes on at 20", [(1, 20, [1], 1)], None),
        ("beyond the vocabulary", [(2, 0, [VOCABULARY], 1)], None),
        ("not enough blocks", [(3, 0, [1] * 65, 1)], [Grant(3, (9,))]),
        ("and no 1048576", [(4, 0, [1], 1)], [Grant(4, (1 << 20,))]),
        ("longer than the model's context", [(5, 0, [1] * 1025, 0)], None),
    ):
        error = direct.rejected(rows, grants=grants)
        assert error.code == "bad-step"
        assert reason in error.reason
    assert case.stages.engines[0].memory().requests == 1
    assert direct.step([(1, 19, PROMPT[-1:], 1)]) == (wanted[0],)
    assert direct.step([(1, 20, wanted[:1], 1)]) == (wanted[1],)


def test_requests_end_with_their_release_and_with_the_session(case: Case) -> None:
    direct = Direct(case.stages)
    direct.step([(1, 0, PROMPT, 1), (2, 0, PROMPT[:5], 1), (3, 0, PROMPT[:9], 0)])
    last = case.stages.engines[-1]
    held = last.memory()
    assert (held.requests, held.held, held.kept) == (3, 3, 0)
    direct.step([(3, 9, PROMPT[9:10], 1)], releases=[1, 2, 77])
    left = last.memory()
    assert (left.requests, left.held, left.kept) == (1, 1, 2)
    assert left.active <= held.active
    assert Direct(case.stages).step([(9, 0, PROMPT, 1)]) == tuple(case.reference.answer(PROMPT, 1))
    assert last.memory().requests == 1


def test_hidden_states_that_are_not_finite_are_told_by_request(case: Case) -> None:
    if len(case.stages.engines) == 1:
        pytest.skip("hidden states do not leave the only stage")
    *_, last = case.stages.engines
    rows = (Row(1, 0, 3, 1), Row(2, 0, 2, 1))
    numbers = np.ones((5, 64), "<f4")
    numbers[4, 7] = np.nan
    step = Step(
        pipeline="p",
        session=case.stages.session,
        step=0,
        rows=rows,
        tensor=Tensor("f32", (5, 64)),
        openings=(Opening(1, GREEDY), Opening(2, GREEDY)),
        grants=(Grant(1, (0,)), Grant(2, (1,))),
    )
    case.stages.session += 1
    step = msgspec.structs.replace(step, session=case.stages.session)
    with pytest.raises(StepRejected) as caught:
        last.step(step, numbers.tobytes())
    assert caught.value.code == "not-finite"
    assert "(2,) are not finite" in caught.value.reason
    assert Direct(case.stages).step([(9, 0, PROMPT, 1)]) == tuple(case.reference.answer(PROMPT, 1))


@pytest.mark.parametrize("coding", ["fp8", "int8"])
def test_hidden_states_are_coded_as_was_said_last(case: Case, coding: Any) -> None:
    first, *rest = case.stages.engines
    if not rest:
        pytest.skip("there is nothing between the stages")
    plain, _ = first.step(*Direct(case.stages).made([(1, 0, PROMPT, 0)]))
    first.send_as(coding)
    coded, _ = first.step(*Direct(case.stages).made([(1, 0, PROMPT, 0)]))
    first.send_as(None)
    assert (plain, coded) == (Tensor("f32", (20, 64)), Tensor("f32", (20, 64), coding))


def test_a_pipeline_may_mix_executors(tmp_path: Path) -> None:
    path = make_torch_model("qwen3_moe", tmp_path / "qwen3_moe")
    requests = requests_of(random.Random(5), 4)
    reference = Reference(path)
    wanted = {r.number: reference.answer(r.tokens, r.max_new) for r in requests}
    with pipeline(path, (2, 4), ["sglang", "torch", "sglang"]) as stages:
        assert stages.serve(requests, prefill_chunk=50) == wanted


def test_several_ranks_answer_as_one(tmp_path: Path) -> None:
    path = make_torch_model("llama", tmp_path / "llama")
    requests = requests_of(random.Random(6), 4)
    reference = Reference(path)
    wanted = {r.number: reference.answer(r.tokens, r.max_new) for r in requests}
    with pipeline(path, (3,), ["sglang", "torch"], tensor_parallel=2) as stages:
        assert stages.serve(requests, prefill_chunk=50) == wanted


def without(source: Path, target: Path, name: str) -> Path:
    shutil.copytree(source, target)
    file = target / "model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if k != name}, file)
    return target


def test_what_a_checkpoint_lacks_is_named(tmp_path: Path) -> None:
    whole = make_torch_model("llama", tmp_path / "llama")
    path = without(whole, tmp_path / "lacking", "model.layers.4.self_attn.k_proj.weight")
    spec = LoadSpec(path=str(path), start=3, end=LAYERS, kv_bytes=KV_BYTES)
    engine = RemoteEngine()
    try:
        with pytest.raises(ExecutorError, match=r"lacks .*layers\.4\.self_attn\.qkv_proj\.weight"):
            engine.load(spec, lambda _: None)
    finally:
        engine.close()
    # The stage of the other layers lacks nothing.
    with opened([msgspec.structs.replace(spec, start=0, end=3)]) as [(_, info)]:
        assert info.layers == 3
        assert 0 < info.kv_tokens * 3 * 2 * 2 * 16 * 4 <= KV_BYTES


def test_a_model_is_described(tmp_path: Path) -> None:
    path = make_torch_model("qwen3", tmp_path / "qwen3")
    engine = RemoteEngine()
    try:
        found = engine.describe(str(path))
    finally:
        engine.close()
    assert found.splits == (1, 2, 3, 4, 5)
    assert found.kv_bytes_per_token == (2 * 2 * 16 * 4,) * LAYERS
    assert (found.vocabulary, found.hidden_size, found.context) == (VOCABULARY, 64, 1024)
    assert found.tied
