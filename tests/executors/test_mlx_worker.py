"""The real thing: the demo model in MLX worker processes, through the daemon's side of them."""

import contextlib
import itertools
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import trio

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors import describe_model, measure_device, open_executor
from pxd.executors.patience import Patience
from pxd.executors.protocol import ExecutorDied, ExecutorError, LoadSpec
from pxd.models.catalog import DEMO_DIRECTORY
from pxd.models.chat import ChatTokenizer
from pxd.serving.requests import Message
from pxd.wire import Coding, Copy, Grant, Opening, Row, Sampled, Sampling, Step, Tensor
from tests.executors.steps import run_step
from tests.models.files import write_model
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow
DEADLINE_S = 240
QUESTIONS = {
    "What is 12 plus 30?": "42",
    "What is 7 times 8?": "56",
    "What is 90 minus 45?": "45",
    "What is the capital of France?": "Paris",
    "What is 25 plus 17?": "42",
}


class Chain:
    """Executors in a row, given one step at a time."""

    def __init__(self, executors: Sequence[Any]) -> None:
        self.executors = executors
        self._numbers = itertools.count()
        self.codings: set[Coding | None] = set()

    async def step(self, rows: Sequence[Row], tokens: Sequence[int], opened: bool = False) -> Any:
        body: Any = np.array(tokens, "<i4").tobytes()
        result: Any = Step(
            pipeline="demo",
            session=1,
            step=next(self._numbers),
            rows=tuple(rows),
            tensor=Tensor("i32", (len(tokens),)),
            openings=tuple(Opening(row.request, Sampling(temperature=0)) for row in rows)
            if opened
            else (),
        )
        for executor in self.executors:
            answer = await run_step(executor, result, body)
            if isinstance(answer, tuple):
                result, body = answer
                self.codings.add(result.tensor.coding)
            else:
                result = answer
        assert isinstance(result, Sampled), result
        return result.tokens


async def answer_all(chain: Chain, tokenizer: ChatTokenizer, questions: Sequence[str]) -> list[str]:
    """Ask everything at once, as one batch that shrinks as answers end."""
    prompts = [tokenizer.encode_chat((Message("user", question),)) for question in questions]
    for number, prompt in enumerate(prompts):
        await chain.step([Row(number, 0, len(prompt) - 1, 0)], prompt[:-1], opened=True)
    sequences = [list(prompt) for prompt in prompts]
    open_requests = set(range(len(prompts)))
    while open_requests:
        rows = [Row(n, len(sequences[n]) - 1, 1, 1) for n in sorted(open_requests)]
        for sampled in await chain.step(rows, [sequences[row.request][-1] for row in rows]):
            if sampled.token in tokenizer.eos:
                open_requests.discard(sampled.request)
            else:
                sequences[sampled.request].append(sampled.token)
    texts = []
    for prompt, sequence in zip(prompts, sequences, strict=True):
        detokenizer = tokenizer.detokenizer()
        texts.append(detokenizer.add(sequence[len(prompt) :]) + detokenizer.finish())
    return texts


async def test_the_demo_model_answers_a_batch_through_two_processes() -> None:
    tokenizer = ChatTokenizer.load(DEMO_DIRECTORY)
    with trio.fail_after(DEADLINE_S):
        async with open_executor("mlx") as first, open_executor("mlx") as second:
            for executor, start, end in ((first, 0, 3), (second, 3, 8)):
                spec = LoadSpec(path=str(DEMO_DIRECTORY), start=start, end=end, kv_bytes=1 << 26)
                await executor.load(spec, lambda _: None)
            answers = await answer_all(Chain([first, second]), tokenizer, list(QUESTIONS))
            report = await second.memory()
    for answer, wanted in zip(answers, QUESTIONS.values(), strict=True):
        assert wanted in answer
    assert report.requests == len(QUESTIONS)
    assert report.active > 0
    assert report.resident > 0


async def test_a_worker_that_stands_still_in_a_step_is_killed() -> None:
    with trio.fail_after(DEADLINE_S):
        async with open_executor("mlx", patience=Patience(least=2.0)) as executor:
            spec = LoadSpec(path=str(DEMO_DIRECTORY), start=0, end=8, kv_bytes=1 << 26)
            await executor.load(spec, lambda _: None)
            chain = Chain([executor])
            await chain.step([Row(1, 0, 3, 1)], [5, 6, 7], opened=True)
            os.kill(executor.pid, signal.SIGSTOP)
            with pytest.raises(ExecutorDied, match="no answer for"):
                await chain.step([Row(1, 3, 1, 1)], [8])
            assert executor.hung


@pytest.mark.parametrize("coding", ["fp8", "int8"])
@pytest.mark.parametrize("cuts", [(3,), (3, 5)])
async def test_the_demo_model_answers_right_with_coded_hidden_states(
    cuts: tuple[int, ...], coding: Coding
) -> None:
    """Also where a stage takes what is coded and codes it again."""
    tokenizer = ChatTokenizer.load(DEMO_DIRECTORY)
    with trio.fail_after(DEADLINE_S):
        async with contextlib.AsyncExitStack() as stack:
            executors = []
            for start, end in itertools.pairwise((0, *cuts, 8)):
                executor = await stack.enter_async_context(open_executor("mlx"))
                spec = LoadSpec(path=str(DEMO_DIRECTORY), start=start, end=end, kv_bytes=1 << 26)
                info = await executor.load(spec, lambda _: None)
                assert info.hidden_bytes == info.hidden_size * 2
                executor.send_as(coding)
                executors.append(executor)
            chain = Chain(executors)
            answers = await answer_all(chain, tokenizer, list(QUESTIONS))
    for answer, wanted in zip(answers, QUESTIONS.values(), strict=True):
        assert wanted in answer
    assert chain.codings == {coding}


async def test_a_block_goes_to_the_second_tier_and_comes_back(tmp_path: Path) -> None:
    """Into another request, which then goes on as the first one did."""
    tokens = list(range(1, 1 + BLOCK_TOKENS))

    async def run(executor: Any, number: int, rows: Sequence[Row], **more: Any) -> Sampled:
        fed = [
            tokens[p % BLOCK_TOKENS]
            for row in rows
            for p in range(row.position, row.position + row.count)
        ]
        step = Step(
            pipeline="demo",
            session=1,
            step=number,
            rows=tuple(rows),
            tensor=Tensor("i32", (len(fed),)),
            **more,
        )
        result = await run_step(executor, step, np.array(fed, "<i4").tobytes())
        assert isinstance(result, Sampled), result
        return result

    def opened(request: int) -> dict[str, Any]:
        opening = Opening(request, Sampling(temperature=0))
        return {"openings": (opening,), "grants": (Grant(request, (request, request + 1)),)}

    with trio.fail_after(DEADLINE_S):
        async with open_executor("mlx") as executor:
            spec = LoadSpec(
                path=str(DEMO_DIRECTORY),
                start=0,
                end=8,
                tier_bytes=1 << 24,
                tier_directory=str(tmp_path),
            )
            info = await executor.load(spec, lambda _: None)
            assert info.tier_slots > 3
            await run(executor, 0, [Row(1, 0, BLOCK_TOKENS, 0)], **opened(1))
            wanted = await run(executor, 1, [Row(1, BLOCK_TOKENS, 1, 1)])
            await run(executor, 2, [], store=Copy(0, (1,), (3,)))
            assert (await executor.copied.receive()).failed == ()
            await run(executor, 3, [], load=Copy(1, (5,), (3,)), releases=(1,), **opened(5))
            assert (await executor.copied.receive()).event == 1
            got = await run(executor, 4, [Row(5, BLOCK_TOKENS, 1, 1)])
    assert [t.token for t in got.tokens] == [t.token for t in wanted.tokens]


def mapped_files(pid: int) -> str:
    maps = Path(f"/proc/{pid}/maps")
    return maps.read_text() if maps.exists() else ""


async def test_a_load_that_is_refused_or_killed(tmp_path: Path) -> None:
    path = make_tiny_model("gemma4_text", tmp_path / "gemma4_text")
    with trio.fail_after(DEADLINE_S):
        async with open_executor("mlx") as executor:
            with pytest.raises(ExecutorError, match="cannot be cut before layer 4"):
                await executor.load(LoadSpec(path=str(path), start=0, end=4), lambda _: None)
            assert (
                await executor.load(LoadSpec(path=str(path), start=0, end=6), lambda _: None)
            ).layers == 6
            # Where it is installed, importing it would take longer than all the rest.
            assert "libtorch" not in mapped_files(executor.pid)
            async with trio.open_nursery() as nursery:

                async def load() -> None:
                    with pytest.raises(ExecutorDied, match="SIGKILL"):
                        await executor.load(LoadSpec(path="", start=0, end=1), lambda _: None)

                os.kill(executor.pid, signal.SIGSTOP)
                nursery.start_soon(load)
                os.kill(executor.pid, signal.SIGKILL)


async def test_descriptions_say_what_can_be_split(tmp_path: Path) -> None:
    with trio.fail_after(DEADLINE_S):
        demo = await describe_model(DEMO_DIRECTORY)
        looped = await describe_model(make_tiny_model("nanbeige", tmp_path / "nanbeige"))
    assert demo.unsupported == ""
    assert demo.splits == tuple(range(1, demo.layers))
    assert demo.layers == len(demo.layer_bytes) == len(demo.kv_bytes_per_token)
    assert demo.tied
    assert sum(demo.layer_bytes) + demo.head_bytes < 6 << 20
    assert looped.splits == ()
    assert "not called once each" in looped.unsupported


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "no_such_model"}, "cannot run no_such_model"),
        ({"model_type": "cache"}, "cannot run cache"),
        ({"model_type": "olmo"}, "cannot run olmo"),
        ({"model_file": "evil.py"}, "its own code"),
        ({}, "lacks intermediate_size, num_attention_heads, rms_norm_eps, which llama"),
        (
            {"intermediate_size": 8, "rms_norm_eps": 0.1, "num_attention_heads": "four"},
            "cannot build",
        ),
    ],
)
async def test_what_mlx_lm_cannot_build_is_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with trio.fail_after(DEADLINE_S), pytest.raises(ExecutorError, match=message):
        await describe_model(write_model(tmp_path, config=config))


async def test_a_description_that_takes_too_long_is_given_up() -> None:
    with pytest.raises(ExecutorError, match="could not be described within 0 s"):
        await describe_model(DEMO_DIRECTORY, timeout=0)


async def test_the_device_is_measured() -> None:
    with trio.fail_after(DEADLINE_S):
        device = await measure_device()
    assert device.kind in ("cpu", "metal", "cuda")
    assert device.name
    assert device.memory > 1 << 28
    assert device.tflops > 0
    assert device.bandwidth > 0
    assert device.executors == ("mlx",)
