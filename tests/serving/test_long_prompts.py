"""A prompt of a hundred thousand tokens: from the JSON body through a real model, in chunks."""

from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import httpx
import mlx.core as mx
import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import LoadSpec, MemoryReport, StageInfo
from pxd.executors.rows import draws_of
from pxd.models.chat import ChatTokenizer
from pxd.serving.requests import Message
from pxd.wire import Buffer, Sampled, SampledToken, Step
from tests.executors.pipeline import Pipeline
from tests.tiny_models import make_tiny_model

from . import harness
from .harness import ArithmeticExecutor, FakeModels, ServingCluster, ServingNode
from .test_overload import http_client

CONTEXT = 131_072
KV_TOKENS = 110_000
PROMPT = "0123456789" * 10_000


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("long_llama", tmp_path_factory.mktemp("models") / "long")


@dataclass
class Seen:
    """Of the steps that had rows."""

    positions: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)


class EngineExecutor(ArithmeticExecutor):
    """The real engine, with all of its model, in this process."""

    def __init__(self, path: Path, seen: Seen, node: ServingNode) -> None:
        super().__init__(node)
        self.path, self.seen = path, seen
        self.engine = MlxEngine()

    async def load(self, spec: LoadSpec, progress: object) -> StageInfo:
        spec = replace(spec, path=str(self.path), start=0, end=1, fingerprint="", kv_bytes=0)
        return replace(self.engine.load(spec, lambda _: None), kv_tokens=KV_TOKENS)

    async def release(self, requests: tuple[int, ...]) -> None:
        self.engine.release(requests)

    async def memory(self) -> MemoryReport:
        return MemoryReport(active=0, resident=0, requests=0)

    async def step(self, step: Step, body: Buffer) -> Sampled:
        await self.node.gate.wait()
        if step.rows:
            self.seen.positions.append(sum(row.count for row in step.rows))
            self.seen.rows.append(len(step.rows))
        drawn = self.engine.step(step, body)
        tokens = tuple(
            SampledToken(request, position, token)  # type: ignore[arg-type]
            for (request, position), token in zip(draws_of(step.rows), drawn, strict=True)
        )
        return Sampled(pipeline=step.pipeline, session=step.session, step=step.step, tokens=tokens)


class LongModels(FakeModels):
    def __init__(self, path: Path) -> None:
        self._tokenizer = ChatTokenizer.load(path)

    async def tokenizer(self, name: str) -> ChatTokenizer:  # type: ignore[override]
        return self._tokenizer


def body(content: str, count: int) -> dict[str, object]:
    message = {"role": "user", "content": content}
    # The end has no place among random weights: the answer is as long as it is asked to be.
    return {"messages": [message], "temperature": 0, "max_tokens": count, "min_tokens": count}


async def test_it_runs_in_chunks_while_others_go_on(
    model: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CONTEXT", CONTEXT)
    tokenizer = ChatTokenizer.load(model)
    tokens = tokenizer.encode_chat((Message("user", PROMPT),))
    assert len(tokens) > 100_000
    alone = Pipeline.load(model, 1).generate(tokens, 4)
    seen = Seen()
    cluster = ServingCluster("a")
    node = cluster.nodes["a"]
    node.executor_type = partial(EngineExecutor, model, seen)
    node.ingress.models = LongModels(model)  # type: ignore[assignment]
    async with cluster.running(), http_client(node) as http, trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish("a"))
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        answers: dict[str, httpx.Response] = {}

        async def ask(content: str, count: int) -> None:
            answers[content] = await http.post("/v1/chat/completions", json=body(content, count))

        node.gate = trio.Event()
        nursery.start_soon(ask, "hi", 200)
        nursery.start_soon(ask, PROMPT, 4)
        await cluster.until(lambda: node.heads.running + node.heads.waiting == 2)
        node.gate.set()
        await cluster.until(lambda: len(answers) == 2)
    response = answers[PROMPT]
    assert response.status_code == 200
    choice = response.json()["choices"][0]
    detokenizer = tokenizer.detokenizer()
    assert choice["message"]["content"] == detokenizer.add(alone) + detokenizer.finish()
    assert response.json()["usage"]["prompt_tokens"] == len(tokens)
    assert answers["hi"].json()["choices"][0]["finish_reason"] == "length"
    assert max(seen.positions) <= 4096
    assert max(seen.rows) == 2, "both at once"
    # The KV of one position takes 2 heads of 16 values, twice, in 4 bytes each.
    assert mx.get_peak_memory() - before < 6 * len(tokens) * 256


async def test_beyond_the_context_it_is_refused(
    model: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CONTEXT", 100_000)
    seen = Seen()
    cluster = ServingCluster("a")
    node = cluster.nodes["a"]
    node.executor_type = partial(EngineExecutor, model, seen)
    node.ingress.models = LongModels(model)  # type: ignore[assignment]
    async with cluster.running(), http_client(node) as http:
        await cluster.ready(cluster.publish("a"))
        for stream in (False, True):
            response = await http.post(
                "/v1/chat/completions", json=body(PROMPT, 4) | {"stream": stream}
            )
            assert response.status_code == 400
            error = response.json()["error"]
            assert (error["param"], error["code"]) == ("messages", "context_length_exceeded")
            assert "context of 100000 tokens" in error["message"]
    assert seen.rows == []


async def test_beyond_the_cache_it_is_refused(
    model: Path, clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model could, but this pipeline has no room for it, however long one waits."""
    monkeypatch.setattr(harness, "CONTEXT", CONTEXT)
    cluster = ServingCluster("a")
    node = cluster.nodes["a"]
    node.ingress.models = LongModels(model)  # type: ignore[assignment]
    async with cluster.running(), http_client(node) as http:
        await cluster.ready(cluster.publish("a"))
        response = await http.post("/v1/chat/completions", json=body(PROMPT, 4))
    assert response.status_code == 400
    assert "KV cache holds 4096" in response.json()["error"]["message"]
