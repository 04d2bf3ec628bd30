"""What a step costs the head of a pipeline, in processor time, with an executor that does nothing.

The head is the daemon's own, on a network that only encodes: scheduling, making and encoding the
step, decoding the tokens that come back, keeping count, encoding what goes to the ingress.
"""

import gc
import time
from collections.abc import Awaitable, Callable
from typing import NamedTuple, cast

import msgspec
import trio

from pxd import wire
from pxd.cluster.adoption import Members
from pxd.cluster.plans import Epoch, ModelPlan, PipelinePlan, Plan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport
from pxd.p2p.network import Method, Network
from pxd.serving.head import Accepted, Submission
from pxd.serving.heads import HeadHost
from scripts.benchmarks.bench import Bench, say

RUNNING = (1, 16, 64, 256)
PROMPT = (5, 6, 7, 8)
WARM_UP = 40
SELF = "head"
PIPELINE = PipelinePlan("p", (StagePlan(SELF, 0, 1),))


Submit = Callable[[str, Submission], Awaitable[Accepted]]


class _Member(NamedTuple):
    record: NodeRecord
    state: str


class _Nowhere:
    """What a head wants of a network. Frames are encoded, and that is all."""

    peer_id = SELF

    def __init__(self) -> None:
        self._sent = self._wanted = 0
        self._all_sent = trio.Event()
        self._submit: Submit | None = None

    def serve(self, _: Method[Submission, Accepted], handler: Submit) -> None:
        self._submit = handler

    async def send(self, _: str, frame: wire.Frame, body: wire.Buffer = b"") -> None:
        wire.encode(frame, len(body))
        self._sent += 1
        if self._sent == self._wanted:
            self._all_sent.set()
        await trio.lowlevel.checkpoint()

    def expect(self, frames: int) -> trio.Event:
        """Set when so many more have been sent."""
        self._wanted = self._sent + frames
        self._all_sent = trio.Event()
        if not frames:
            self._all_sent.set()
        return self._all_sent

    async def submit(self, submission: Submission) -> None:
        assert self._submit is not None
        await self._submit("ingress", submission)


class _NullExecutor:
    """Draws token 9 for every row behind a prompt. What that takes is kept apart."""

    def __init__(self) -> None:
        self.spent_s = 0.0
        self._send, self._steps = trio.open_memory_channel[wire.Step](1)

    async def feed(self, _: str, step: wire.Step, body: wire.Buffer) -> None:
        wire.encode(step, len(body))
        await self._send.send(step)

    async def answer(self, head: HeadHost, network: _Nowhere, steps: int) -> None:
        for _ in range(steps):
            step = await self._steps.receive()
            began = time.process_time()
            ends = [(row.request, row.position + row.count) for row in step.rows]
            tokens = tuple(wire.SampledToken(*end, 9) for end in ends if end[1] > len(PROMPT))
            reply = wire.Sampled(
                pipeline=step.pipeline, session=step.session, step=step.step, tokens=tokens
            )
            encoded = msgspec.msgpack.encode(reply)
            self.spent_s += time.process_time() - began
            decoded = wire.frame_decoder.decode(encoded)
            assert isinstance(decoded, wire.Sampled)
            all_sent = network.expect(len(tokens))
            head.sampled(SELF, decoded)
            # A real executor takes long enough for that.
            await all_sent.wait()


def run(bench: Bench) -> None:
    rounds, steps = (2, 100) if bench.quick else (5, 300)
    say(f"    {steps} steps with {', '.join(map(str, RUNNING))} requests, {rounds} rounds")
    for running in RUNNING:
        samples = [1e3 * trio.run(_step_s, running, steps) for _ in range(rounds)]
        what = f"{running} running: processor time of a step"
        bench.figure(f"head.{running}", what, "ms", *samples)


async def _step_s(running: int, steps: int) -> float:
    network, executor = _Nowhere(), _NullExecutor()
    head = HeadHost(cast(Network, network), executor.feed)
    async with trio.open_nursery() as nursery:
        await nursery.start(head.run)
        head.apply(_plan())
        head.follow(_members())
        for number in range(running):
            await network.submit(_submission(number, max_new=2 * (WARM_UP + steps)))
        # Long enough for all to be let in.
        await executor.answer(head, network, WARM_UP)
        assert (head.running, head.waiting) == (running, 0)
        gc.collect()
        executor.spent_s = 0.0
        began = time.process_time()
        await executor.answer(head, network, steps)
        spent = time.process_time() - began - executor.spent_s
        nursery.cancel_scope.cancel()
    return spent / steps


def _submission(number: int, max_new: int) -> Submission:
    return Submission(
        pipeline=PIPELINE.id,
        request=f"r{number}",
        tokens=(number + 10, *PROMPT),
        generated=0,
        max_new=max_new,
        sampling=wire.Sampling(temperature=0),
        eos=(),
    )


def _plan() -> Plan:
    model = ModelPlan(name="m", layers=1, context=1 << 16, pipelines=(PIPELINE,))
    return Plan(Epoch(1, SELF, 1), (model,))


def _members() -> Members:
    report = StageReport(
        model="m", pipeline=PIPELINE.id, start=0, end=1, state="ready", kv_tokens=1 << 20,
        prefix_cache=True,
    )  # fmt: skip
    record = NodeRecord(id=SELF, name=SELF, stages=(report,))
    return {SELF: _Member(record, "alive")}
