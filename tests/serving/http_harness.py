"""From HTTP request to tokens and back: real API, ingress, head and stage, the demo's tokenizer.

Only the model is none: it draws the tokens of a script.
"""

import contextlib
import json
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from functools import cache, partial
from importlib.resources import files
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
    """What the model draws, and what it heard; its process dies once, before token `dies_at`.

    From token `hangs_at` on it draws nothing while the gate of its node is closed.
    """

    tokens: list[int]
    dies_at: int = -1
    hangs_at: int = -1
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
            if place == script.hangs_at:
                self.node.gate = trio.Event()
                await self.node.gate.wait()
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

    def __init__(self, http: httpx.AsyncClient, script: Script, cluster: ServingCluster) -> None:
        self._http, self.script, self.cluster = http, script, cluster
        self.node = cluster.nodes["a"]

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
async def serving(text: str, *, dies_at: int = -1, hangs_at: int = -1) -> AsyncIterator[Client]:
    """A model that answers everything with this text."""
    script = Script(encode(text), dies_at, hangs_at)
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
            yield Client(http, script, cluster)
        nursery.cancel_scope.cancel()


def encode(text: str) -> list[int]:
    tokens: list[int] = demo()._tokenizer.encode(text)
    return tokens
