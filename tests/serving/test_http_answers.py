"""From HTTP request to tokens and back: real API, ingress, head and stage, the demo's tokenizer.

Only the model is none: it draws the tokens of a script.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
from itertools import accumulate
from pathlib import Path
from typing import Any

import httpx
import msgspec
import pytest
import trio

from pxd.api.app import create_app
from pxd.api.server import serve
from pxd.executors.protocol import ExecutorDied
from pxd.models.chat import ChatTokenizer
from pxd.wire import Buffer, Logprobs, Nack, Opening, Sampled, Step
from tests.api.fakes import FakeDaemon

from .harness import ArithmeticExecutor, FakeModels, ServingCluster, ServingNode

BOTH = pytest.mark.parametrize("stream", [False, True])


@cache
def demo() -> ChatTokenizer:
    return ChatTokenizer.load(Path(str(files("pxd.models") / "demo")))


class DemoModels(FakeModels):
    async def tokenizer(self, name: str) -> ChatTokenizer:  # type: ignore[override]
        return demo()


@dataclass
class Script:
    """What the model draws, and what it heard; its process dies once, before token `dies_at`."""

    tokens: list[int]
    dies_at: int = -1
    prompt: int = 0
    openings: list[Opening] = field(default_factory=list)


class ScriptedExecutor(ArithmeticExecutor):
    """Draws the tokens of a script, and then the end. Log probabilities tell the place."""

    def __init__(self, script: Script, node: ServingNode) -> None:
        super().__init__(node)
        self.script = script

    async def step(self, step: Step, body: Buffer) -> Sampled | Nack | tuple[Step, Buffer]:
        result = await super().step(step, body)
        assert isinstance(result, Sampled)
        script = self.script
        script.openings += step.openings
        tokens = []
        for item in result.tokens:
            script.prompt = script.prompt or item.position
            place = item.position - script.prompt
            if place == script.dies_at:
                script.dies_at = -1
                self.die("killed by signal 9")
                raise ExecutorDied("killed by signal 9")
            token = script.tokens[place] if place < len(script.tokens) else demo().eos[0]
            scores = Logprobs(-place / 8, ((token, -place / 8), (demo().eos[0], -9.0)))
            tokens.append(msgspec.structs.replace(item, token=token, logprobs=scores))
        return msgspec.structs.replace(result, tokens=tuple(tokens))


class Client:
    """Asks one node over HTTP."""

    def __init__(self, http: httpx.AsyncClient, script: Script) -> None:
        self._http, self.script = http, script

    async def ask(self, *, stream: bool = False, **fields: Any) -> httpx.Response:
        body = {"messages": [{"role": "user", "content": "go"}], "stream": stream, **fields}
        return await self._http.post("/v1/chat/completions", json=body)

    async def answer(self, *, stream: bool, **fields: Any) -> "Answer":
        response = await self.ask(stream=stream, **fields)
        assert response.status_code == 200, response.text
        if not stream:
            choice = response.json()["choices"][0]
            return Answer(
                [choice["message"]["content"]], choice["logprobs"], choice["finish_reason"]
            )
        *events, done = response.text.removesuffix("\n\n").split("\n\n")
        assert done == "data: [DONE]"
        choices = [json.loads(event.removeprefix("data: "))["choices"][0] for event in events]
        scores = [choice["logprobs"] for choice in choices if choice["logprobs"]]
        return Answer(
            [choice["delta"].get("content", "") for choice in choices],
            {"content": [entry for item in scores for entry in item["content"]], "refusal": None}
            if scores
            else None,
            choices[-1]["finish_reason"],
        )


class Answer(msgspec.Struct):
    pieces: list[str]
    logprobs: dict[str, Any] | None
    finish: str

    @property
    def text(self) -> str:
        return "".join(self.pieces)


@contextlib.asynccontextmanager
async def serving(text: str, *, dies_at: int = -1) -> AsyncIterator[Client]:
    """A model that answers everything with this text."""
    script = Script(encode(text), dies_at)
    cluster = ServingCluster("a")
    node = cluster.nodes["a"]
    node.executor_type = partial(ScriptedExecutor, script)
    node.ingress.models = DemoModels()  # type: ignore[assignment]
    daemon = FakeDaemon()
    daemon.ingress = node.ingress  # type: ignore[assignment]
    async with cluster.running(), trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish("a"))
        url = await nursery.start(
            partial(serve, create_app(daemon), "127.0.0.1", 0, shutdown=daemon.shutdown, grace=0.0)
        )
        async with httpx.AsyncClient(base_url=url, timeout=20) as http:
            yield Client(http, script)
        nursery.cancel_scope.cancel()


def encode(text: str) -> list[int]:
    tokens: list[int] = demo()._tokenizer.encode(text)
    return tokens


@BOTH
async def test_characters_of_several_tokens_come_whole(stream: bool) -> None:
    text = "a🙂b👩‍👩‍👧é 東京🙂"
    assert len(encode("🙂")) == 4, "the demo's tokenizer has a token for each of its bytes"
    async with serving(text) as client:
        answer = await client.answer(stream=stream)
    assert (answer.text, answer.finish) == (text, "stop")
    assert not any("\N{REPLACEMENT CHARACTER}" in piece for piece in answer.pieces)
    if stream:
        assert "🙂" in answer.pieces


@BOTH
async def test_a_character_cut_off_by_max_tokens_shows_as_one_that_could_not_be_read(
    stream: bool,
) -> None:
    """Which is what decoding these tokens gives."""
    async with serving("ab🙂") as client:
        answer = await client.answer(stream=stream, max_tokens=len(encode("ab")) + 2)
    assert (answer.text, answer.finish) == ("ab\N{REPLACEMENT CHARACTER}", "length")


@BOTH
@pytest.mark.parametrize(
    ("text", "stop", "seen"),
    [
        ("one two THE_END three", "THE_END", "one two "),
        ("one two THE_EMU three", "THE_END", "one two THE_EMU three"),
        ("one 🙂🙃 two", "🙂🙃", "one "),
        ("one 🙂🙂 two", "🙂🙃", "one 🙂🙂 two"),
        ("one two", "wo", "one t"),
        ("one two TH", "THE_END", "one two TH"),
    ],
)
async def test_nothing_of_a_stop_string_is_sent(
    text: str, stop: str, seen: str, stream: bool
) -> None:
    assert len(encode(stop)) > 1 or text == "one two"
    async with serving(text) as client:
        answer = await client.answer(stream=stream, stop=[stop, "never"], logprobs=True)
    assert (answer.text, answer.finish) == (seen, "stop")
    assert answer.logprobs is not None
    told = b"".join(bytes(entry["bytes"]) for entry in answer.logprobs["content"])
    # Of the token in which the stop string begins, the beginning was sent.
    assert told.startswith(seen.encode())
    assert len(told) == len(seen.encode()) or text == "one two"


@BOTH
async def test_logprobs_have_a_token_each(stream: bool) -> None:
    async with serving("b🙂") as client:
        answer = await client.answer(stream=stream, logprobs=True, top_logprobs=2)
    assert answer.logprobs is not None
    content = answer.logprobs["content"]
    assert bytes(byte for entry in content for byte in entry["bytes"]) == "b🙂".encode()
    assert content[0] == {
        "token": "b",
        "logprob": 0.0,
        "bytes": [98],
        "top_logprobs": [
            {"token": "b", "logprob": 0.0, "bytes": [98]},
            {"token": "<|end|>", "logprob": -9.0, "bytes": list(b"<|end|>")},
        ],
    }
    assert [entry["logprob"] for entry in content] == [-place / 8 for place in range(5)]
    assert content[1]["token"] == "\N{REPLACEMENT CHARACTER}"


@BOTH
async def test_without_logprobs_there_are_none(stream: bool) -> None:
    """Though this model gives some unasked."""
    async with serving("abc") as client:
        assert (await client.answer(stream=stream)).logprobs is None


async def test_stop_tokens_end_the_answer() -> None:
    async with serving("one two x") as client:
        answer = await client.answer(stream=False, stop_token_ids=[encode("x")[0]])
    assert (answer.text, answer.finish) == ("one two ", "stop")


@BOTH
async def test_an_answer_that_goes_on_elsewhere_says_what_it_has_already(stream: bool) -> None:
    """And neither text nor log probabilities come twice or get lost."""
    text = "aab🙂🙂"
    async with serving(text, dies_at=6) as client:
        answer = await client.answer(stream=stream, logprobs=True, repetition_penalty=1.5)
    assert (answer.text, answer.finish) == (text, "stop")
    assert answer.logprobs is not None
    assert bytes(b for e in answer.logprobs["content"] for b in e["bytes"]) == text.encode()
    first, again = client.script.openings
    assert first.history is not None
    assert again.history is not None
    assert (first.history.answer, again.history.prompt) == ((), first.history.prompt)
    assert list(accumulate(again.history.answer)) == sorted(encode(text)[:6])


async def test_every_parameter_reaches_the_last_stage() -> None:
    fields = {
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 40,
        "min_p": 0.05,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.25,
        "seed": 3,
    }
    async with serving("abc") as client:
        response = await client.ask(
            **fields,
            logit_bias={"5": -100},
            logprobs=True,
            top_logprobs=2,
            min_tokens=2,
            stop_token_ids=[7],
        )
    [opening] = client.script.openings
    prompt = response.json()["usage"]["prompt_tokens"]
    assert msgspec.structs.asdict(opening.sampling) == {
        **fields,
        "logit_bias": ((5, -100.0),),
        "logprobs": 2,
        "min_length": prompt + 2,
        "barred": (*demo().eos, 7),
    }
    assert opening.history is not None
    assert opening.history.answer == ()
    assert opening.history.prompt


@pytest.mark.parametrize(
    ("fields", "param", "message"),
    [
        ({"logit_bias": {"5": 1, "752": 1}}, "logit_bias", "752"),
        ({"logit_bias": {"999999999": 1}}, "logit_bias", "999999999"),
        ({"stop_token_ids": [7, 752]}, "stop_token_ids", "752"),
        ({"max_tokens": 0}, "max_tokens", "max_tokens"),
        ({"max_completion_tokens": 0}, "max_completion_tokens", "max_completion_tokens"),
    ],
)
async def test_what_cannot_be_is_refused(fields: dict[str, Any], param: str, message: str) -> None:
    async with serving("abc") as client:
        response = await client.ask(**fields)
    assert response.status_code == 400
    error = response.json()["error"]
    assert error["param"] == param
    assert message in error["message"]
    assert client.script.openings == []
