"""A whole serving cluster in one trio loop: real services, in-memory network, arithmetic model.

The model is made so that every stage must have run, on gapless positions, for the answer to be
right: a stage passes each value on plus one, and the next token depends on all values so far.
"""

import contextlib
import math
from array import array
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import msgspec
import trio

from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan, pipeline_id
from pxd.cluster.records import NodeRecord, StageReport
from pxd.engine.blocks import blocks_for
from pxd.executors.protocol import (
    ExecutorDied,
    ExecutorError,
    LoadSpec,
    MemoryReport,
    StageInfo,
    StepResult,
)
from pxd.models.thinking import Thoughts
from pxd.serving.heads import HeadHost
from pxd.serving.ingress import ChatIngress
from pxd.serving.requests import Message
from pxd.serving.signal import Signal
from pxd.serving.stage import StageHost
from pxd.wire import (
    Buffer,
    Cancel,
    Coding,
    Copied,
    Frame,
    Nack,
    Output,
    Sampled,
    SampledToken,
    Step,
    Tensor,
)
from tests.memory_network import MemoryHub

CONTEXT = 512
VOCABULARY = 97
EOS = 96
LAYERS = 6


def next_token(tokens: list[int], stages: int) -> int:
    """What the arithmetic model generates after `tokens` on a pipeline of `stages`."""
    return sum((i + 1) * (t + stages) for i, t in enumerate(tokens)) % VOCABULARY


def reference(tokens: list[int], count: int, stages: int) -> list[int]:
    answer: list[int] = []
    while len(answer) < count:
        token = next_token([*tokens, *answer], stages)
        if token == EOS:
            break
        answer.append(token)
    return answer


class FakeTokenizer:
    """A message is its characters; a token is written as its number in brackets."""

    eos = (EOS,)
    temperature = 0.0
    top_p = 1.0
    top_k = 0
    min_p = 0.0

    def encode_chat(self, messages: tuple[Message, ...], options: object = None) -> list[int]:
        return [ord(c) % 90 for message in messages for c in message.content]

    def detokenizer(self) -> "FakeTokenizer":
        return self

    def add(self, tokens: list[int]) -> str:
        return "".join(f"[{token}]" for token in tokens)

    def finish(self) -> str:
        return ""

    def knows(self, token: int) -> bool:
        return token < VOCABULARY

    def thoughts(self, prompt: list[int]) -> Thoughts:
        return Thoughts(None)

    def piece(self, token: int) -> bytes:
        return self.add([token]).encode()


class FakeModels:
    async def tokenizer(self, name: str) -> FakeTokenizer:
        return FakeTokenizer()

    async def directory(
        self, name: str, fingerprint: str, start: int, end: int, progress: object
    ) -> Path:
        return Path("/models") / name


_Submitted = tuple[Step, Buffer, Coding | None, Callable[[StepResult], None]]


class ArithmeticExecutor:
    """An executor whose process can be killed with `die`, and held back with `gate`."""

    def __init__(self, node: "ServingNode") -> None:
        self.pid = 0
        self.hung = False
        self.node = node
        self.caches: dict[int, list[float]] = {}
        self.guessed: dict[int, int] = {}
        self.send_copied, self.copied = trio.open_memory_channel[Copied](math.inf)
        self._send_step, self._steps = trio.open_memory_channel[_Submitted](math.inf)
        self.scope = trio.CancelScope()
        self._died = trio.Event()
        self._why = ""
        self._last = False
        self._session = -1
        self.steps = 0
        self.coding: Coding | None = None
        self._next_coding: Coding | None = None
        self.sent_as: list[Coding | None] = []

    def die(self, why: str) -> None:
        self._why = why
        self._died.set()

    async def load(self, spec: LoadSpec, progress: object) -> StageInfo:
        await trio.lowlevel.checkpoint()
        if self.node.refuse_load:
            raise ExecutorError(self.node.refuse_load)
        self._last = spec.end == LAYERS
        return StageInfo(
            layers=spec.end - spec.start,
            hidden_size=1,
            weight_bytes=1,
            kv_tokens=4096,
            trims=self.node.trims,
            hidden_bytes=4,
        )

    async def wait_died(self) -> str:
        await self._died.wait()
        return self._why

    def submit(self, step: Step, body: Buffer, take: Callable[[StepResult], None]) -> None:
        self._send_step.send_nowait((step, body, self._next_coding, take))

    def send_as(self, coding: Coding | None) -> None:
        self._next_coding = coding

    async def run(self) -> None:
        """Run what is submitted, one after the other, until the process dies."""
        with self.scope:
            async for step, body, coding, take in self._steps:
                self.coding = coding
                try:
                    result: StepResult = await self.step(step, body)
                except (ExecutorDied, ExecutorError) as error:
                    result = error
                if self._died.is_set():
                    return
                take(result)

    async def release(self, requests: tuple[int, ...]) -> None:
        for request in requests:
            self.caches.pop(request, None)

    async def memory(self) -> MemoryReport:
        held = sum(blocks_for(len(cache)) for cache in self.caches.values())
        return MemoryReport(active=0, resident=0, requests=len(self.caches), held=held)

    def open(self, step: Step) -> None:
        for opening in step.openings:
            self.caches[opening.request] = []

    def draw(self, values: list[float]) -> int:
        return sum((i + 1) * int(value) for i, value in enumerate(values)) % VOCABULARY

    async def step(self, step: Step, body: Buffer) -> Sampled | Nack | tuple[Step, Buffer]:
        await self.node.gate.wait()
        await trio.sleep(self.node.pace * sum(row.count for row in step.rows))
        self.steps += 1
        if self._died.is_set():
            raise ExecutorDied(self._why)
        if step.session != self._session:
            self._session = step.session
            self.caches.clear()
        await self.release(step.releases)
        self.open(step)
        values = array("i" if step.tensor.dtype == "i32" else "f", bytes(body))
        sampled, offset = [], 0
        for row in step.rows:
            cache = self.caches[row.request]
            assert 0 <= len(cache) - row.position <= self.guessed.pop(row.request, 0)
            del cache[row.position :]
            cache.extend(value + 1 for value in values[offset : offset + row.count])
            offset += row.count
            self.guessed[row.request] = max(row.draws - 1, 0)
            for place in range(len(cache) - row.draws + 1, len(cache) + 1) if self._last else ():
                sampled.append(SampledToken(row.request, place, self.draw(cache[:place])))
        if self._last:
            return Sampled(
                pipeline=step.pipeline,
                session=step.session,
                step=step.step,
                tokens=tuple(sampled),
            )
        if step.rows:
            self.sent_as.append(self.coding)
        out = array("f", [value + 1 for value in values])
        tensor = Tensor("f32", (len(out), 1))
        return msgspec.structs.replace(step, tensor=tensor), out.tobytes()


class Member(msgspec.Struct):
    record: NodeRecord
    state: str = "alive"


class ServingNode:
    """Stage, head and ingress of one node. Its executor takes `pace` seconds per position, and
    frames `delay` seconds to reach it."""

    def __init__(self, cluster: "ServingCluster", peer_id: str) -> None:
        self.cluster = cluster
        self.peer_id = peer_id
        self.network = cluster.hub.network(peer_id)
        self.executors: list[ArithmeticExecutor] = []
        self.gate = trio.Event()
        self.gate.set()
        self.refuse_load = ""
        self.executor_type: Callable[[ServingNode], ArithmeticExecutor] = ArithmeticExecutor
        self.pace = self.delay = 0.0
        self.trims = True
        self.changed = Signal()
        self.scope = trio.CancelScope()
        self.plan: Plan | None = None
        models = FakeModels()
        self.stages = StageHost(
            self.network, self.open_executor, models.directory, self.report_stages
        )
        self.heads = HeadHost(self.network, self.stages.feed, feed_now=self.stages.feed_now)
        self.ingress = ChatIngress(
            self.network,
            models,  # type: ignore[arg-type]
            lambda: self.plan,
            lambda: cluster.members,
            self.changed,
        )
        self.network.on_frame(self.on_frame)

    @contextlib.asynccontextmanager
    async def open_executor(self) -> AsyncIterator[ArithmeticExecutor]:
        executor = self.executor_type(self)
        self.executors.append(executor)
        self.nursery.start_soon(executor.run)
        try:
            yield executor
        finally:
            executor.scope.cancel()

    def report_stages(self, reports: tuple[StageReport, ...]) -> None:
        self.cluster.update(self.peer_id, stages=reports)

    async def on_frame(self, peer: str, frame: Frame, body: Buffer) -> None:
        self.cluster.frames.append((peer, self.peer_id, frame))
        await trio.sleep(self.delay)
        match frame:
            case Step():
                await self.stages.feed(peer, frame, body)
            case Sampled():
                self.heads.sampled(peer, frame)
            case Copied():
                self.heads.copied(peer, frame)
            case Nack():
                self.heads.nack(peer, frame)
            case Output():
                self.ingress.output(peer, frame)
            case Cancel():
                self.heads.cancel(peer, frame)

    async def run(self, *, task_status: "trio.TaskStatus[None]") -> None:
        with self.scope:
            async with trio.open_nursery() as self.nursery:
                nursery = self.nursery
                await nursery.start(self.network.run)
                await nursery.start(self.heads.run)
                await nursery.start(self.ingress.run)
                nursery.start_soon(self.stages.run)
                task_status.started()

    def take(self, plan: Plan) -> None:
        self.plan = plan
        self.stages.apply(plan)
        self.heads.apply(plan)
        self.follow()

    def follow(self) -> None:
        self.heads.follow(self.cluster.members)
        self.ingress.follow()
        self.changed.notify()


class ServingCluster:
    """Nodes that share one view of the membership, changed at once everywhere."""

    def __init__(self, *names: str) -> None:
        self.hub = MemoryHub()
        self.members = {name: Member(NodeRecord(id=name, name=name, started=1.0)) for name in names}
        self.nodes = {name: ServingNode(self, name) for name in names}
        self.frames: list[tuple[str, str, Frame]] = []
        self.version = 0

    @contextlib.asynccontextmanager
    async def running(self) -> AsyncIterator["ServingCluster"]:
        async with trio.open_nursery() as nursery:
            for node in self.nodes.values():
                await nursery.start(node.run)
            yield self
            nursery.cancel_scope.cancel()

    def update(self, name: str, **changes: object) -> None:
        member = self.members[name]
        member.record = msgspec.structs.replace(member.record, **changes)
        self.follow()

    def follow(self) -> None:
        for node in self.nodes.values():
            node.follow()

    def make_plan(self, *names: str) -> Plan:
        """One pipeline over the named nodes, in order, with equal ranges."""
        size = LAYERS // len(names)
        stages = tuple(
            StagePlan(name, i * size, LAYERS if i + 1 == len(names) else (i + 1) * size)
            for i, name in enumerate(names)
        )
        pipeline = PipelinePlan(pipeline_id("sums", "", stages), stages)
        model = ModelPlan(name="sums", layers=LAYERS, context=CONTEXT, pipelines=(pipeline,))
        self.version += 1
        return Plan(Epoch(1, names[0], self.version), (model,))

    def publish(self, *names: str) -> Plan:
        plan = self.make_plan(*names)
        for name, node in self.nodes.items():
            if self.members[name].state == "alive":
                node.take(plan)
        return plan

    async def ready(self, plan: Plan) -> None:
        """Wait until every stage of the plan is ready, and has heard of its head's session."""
        await self.until(
            lambda: all(
                any(
                    report.state == "ready" and report.pipeline == pipeline.id
                    for report in self.members[stage.node].record.stages
                )
                for model in plan.models
                for pipeline in model.pipelines
                for stage in pipeline.stages
            )
        )
        heads = [head for node in self.nodes.values() for head in node.heads._heads.values()]
        await self.until(lambda: not any(head._sent_at for head in heads))

    async def until(self, condition) -> None:
        with trio.fail_after(600):
            while not condition():
                await trio.sleep(0.01)

    async def kill(self, name: str) -> None:
        """The node's process is gone, and everybody has noticed."""
        self.nodes[name].scope.cancel()
        self.members[name].state = "dead"
        for other, node in self.nodes.items():
            if other != name:
                node.heads.peer_gone(name)
        self.follow()
