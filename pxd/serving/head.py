"""Drives pipelines: the node with stage 0 schedules every step and hands tokens to the ingresses.

A *session* is one life of a pipeline's scheduler. It begins when all stages are ready and ends when
one is not: then every request in it is given up, with the reason, and its ingress brings it home
some other way. The stages forget a session when they see the next one.
"""

import logging
import secrets
from array import array
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
import trio

from pxd.cluster.plans import PipelinePlan, Plan
from pxd.engine.continuous import Continuous, ContinuousConfig
from pxd.engine.history import has_penalties
from pxd.engine.scheduler import (
    Generated,
    NeverFits,
    NewRequest,
    PlannedStep,
    QueueFull,
    Scheduler,
)
from pxd.p2p.network import CallFailed, Method, Network, NetworkError
from pxd.serving.readiness import Members, Readiness, readiness
from pxd.serving.timings import HeadFigures, PipelineTimings
from pxd.wire import (
    MAX_ENDS,
    MAX_HISTORY,
    Buffer,
    Cancel,
    Copied,
    Count,
    Identifier,
    Nack,
    Output,
    Sampled,
    Sampling,
    Step,
    Tensor,
    TokenId,
)

log = logging.getLogger("pxd.serving.head")

STEP_DEADLINE_S = 300.0
HEARTBEAT_S = 15.0
PACE_S = 0.25
"""How long a step's share of prompts may hold up those who wait for their next token."""

LEAST_PREFILL = 64
OUTBOX_FRAMES = 4096
OUTPUT_RETRIES_S = (0.1, 0.5, 2.0, 5.0)
MAX_REQUESTS = 4096

Feed = Callable[[str, Step, Buffer], Awaitable[None]]


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a pipeline's head. The last `generated` of `tokens` are answer already."""

    pipeline: Identifier
    request: Identifier
    tokens: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=1_000_000)]
    generated: Count
    max_new: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    sampling: Sampling
    eos: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_ENDS)]


class Accepted(msgspec.Struct, frozen=True):
    """How many requests the head holds, this one included."""

    load: Count


SUBMIT: Method[Submission, Accepted] = Method("head.submit", Submission, Accepted)


class _Client:
    """Where a request's tokens go: its ingress and the name it has there."""

    __slots__ = ("index", "peer", "request")

    def __init__(self, peer: str, request: str, index: int) -> None:
        self.peer, self.request, self.index = peer, request, index


class Head:
    """One pipeline. Owned by `HeadHost`, which runs `run` and `watch`."""

    def __init__(
        self,
        pipeline: PipelinePlan,
        feed: Feed,
        emit: Callable[[str, Output], None],
        self_id: str,
    ) -> None:
        self.pipeline = pipeline
        self.cancel_scope = trio.CancelScope()
        self.reason = "the pipeline is being set up"
        self._feed = feed
        self._emit = emit
        self._self_id = self_id
        self._scheduler: Scheduler | None = None
        self._policy = Continuous(ContinuousConfig(kv_tokens=0))
        self._session = 0
        self._next_request = 0
        self._clients: dict[int, _Client] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._sent_at: dict[int, float] = {}
        self._oldest_copy: tuple[int | None, float] = None, 0.0
        self._timings = PipelineTimings()
        self._wake = trio.Event()

    @property
    def running(self) -> int:
        return self._scheduler.running if self._scheduler else 0

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting if self._scheduler else 0

    @property
    def figures(self) -> HeadFigures:
        return self._timings.figures

    def follow(self, members: Members) -> None:
        """Open or close the session as the stages' reports demand."""
        state = readiness(self.pipeline, members)
        self.reason = state.reason
        if state.ready and self._scheduler is None:
            self._open(state)
        elif not state.ready and self._scheduler is not None:
            died = "executor-died: " if "restarting" in state.states else ""
            self.close_session(died + state.reason)

    def _open(self, state: Readiness) -> None:
        config = ContinuousConfig(
            kv_tokens=state.kv_tokens,
            max_in_flight=len(self.pipeline.stages),
            prefix_cache=state.prefix_cache,
            stages=len(self.pipeline.stages),
            tier_slots=state.tier_slots,
            root=self.pipeline.id.encode(),
        )
        self._policy = Continuous(config)
        self._scheduler = Scheduler(self._policy)
        self._session = secrets.randbits(47)
        self._timings = PipelineTimings()
        log.info(
            "pipeline %s serves: %d KV token positions, %d blocks in the second tier",
            self.pipeline.id,
            state.kv_tokens,
            state.tier_slots,
        )

    def close_session(self, reason: str) -> None:
        """Give every request back to its ingress, which may submit it again elsewhere."""
        self._scheduler = None
        self._sent_at.clear()
        self._oldest_copy = None, 0.0
        if self._clients:
            log.warning(
                "pipeline %s gives up %d requests: %s", self.pipeline.id, len(self._clients), reason
            )
        for number in list(self._clients):
            self._fail(number, reason)

    def submit(self, peer: str, submission: Submission) -> Accepted:
        """Raises `CallFailed` with code not-ready, duplicate, overloaded or never-fits."""
        scheduler = self._scheduler
        if scheduler is None:
            raise CallFailed("not-ready", self.reason)
        key = (peer, submission.request)
        if key in self._numbers:
            raise CallFailed("duplicate", "the head already has a request of this name")
        if len(self._clients) >= MAX_REQUESTS:
            raise CallFailed("overloaded", f"this pipeline holds {MAX_REQUESTS} requests already")
        longest = len(submission.tokens) + submission.max_new
        if has_penalties(submission.sampling) and longest > MAX_HISTORY:
            raise CallFailed(
                "never-fits",
                f"with penalties, prompt and answer may take {MAX_HISTORY} tokens, not {longest}",
            )
        number = self._next_request
        request = NewRequest(
            number=number,
            tokens=submission.tokens,
            max_new=submission.max_new,
            sampling=submission.sampling,
            generated=submission.generated,
            eos=frozenset(submission.eos),
            source=peer,
        )
        try:
            scheduler.add(request)
        except NeverFits as error:
            raise CallFailed("never-fits", str(error)) from error
        except QueueFull as error:
            raise CallFailed("overloaded", str(error)) from error
        self._next_request += 1
        self._timings.submitted(
            trio.current_time(), number, len(submission.tokens), alone=not self._clients
        )
        self._clients[number] = _Client(peer, submission.request, submission.generated)
        self._numbers[key] = number
        self._wake.set()
        return Accepted(len(self._clients))

    def cancel(self, peer: str, request: str) -> None:
        number = self._numbers.get((peer, request))
        if number is not None:
            self._forget(number)
            if self._scheduler is not None:
                self._scheduler.cancel(number)
            self._wake.set()

    def cancel_all_of(self, peer: str) -> None:
        """The ingress `peer` is gone for good; nobody waits for these tokens."""
        for owner, request in [key for key in self._numbers if key[0] == peer]:
            self.cancel(owner, request)

    def connection_lost(self, peer: str) -> None:
        """Frames may have been lost on the way to or from `peer`."""
        if self._scheduler is not None and any(s.node == peer for s in self.pipeline.stages):
            self.close_session(f"unreachable: lost the connection to {peer}")

    def heartbeat(self) -> None:
        """Tell every ingress that its request is still here, and how far it is."""
        for client in list(self._clients.values()):
            self._emit(client.peer, Output(request=client.request, index=client.index))

    def sampled(self, frame: Sampled) -> None:
        if self._scheduler is None or frame.session != self._session:
            return
        sent = self._sent_at.pop(frame.step, None)
        results = self._scheduler.step_done(frame.step, frame.tokens)
        if sent is not None:
            self._timings.returned(trio.current_time(), frame.step, sent, results)
            self._keep_pace()
        for result in results:
            self._deliver(result)
        self._wake.set()

    def copied(self, stage: int, frame: Copied) -> None:
        if self._scheduler is None or frame.session != self._session:
            return
        self._scheduler.copied(frame.event, stage, frame.failed)
        self._wake.set()

    def _keep_pace(self) -> None:
        positions = self._timings.positions_within(PACE_S)
        if positions is not None:
            most = self._policy.config.step_tokens
            self._policy.mixed_tokens = min(max(positions, LEAST_PREFILL), most)

    def nack(self, frame: Nack) -> None:
        if self._scheduler is None or frame.session != self._session:
            return
        reason = f"{frame.code}: {frame.reason}"
        if frame.code == "executor-died":
            self.close_session(reason)
            return
        self._sent_at.pop(frame.step, None)
        for number in self._scheduler.step_failed(frame.step, frame.requests):
            self._fail(number, reason)
        self._wake.set()

    def _deliver(self, result: Generated) -> None:
        client = self._clients.get(result.request)
        if client is None:
            return
        self._emit(
            client.peer,
            Output(
                request=client.request,
                index=client.index,
                tokens=result.tokens,
                logprobs=result.logprobs,
                finish=result.finish,
            ),
        )
        client.index += len(result.tokens)
        if result.finish is not None:
            self._forget(result.request)

    def _fail(self, number: int, reason: str) -> None:
        client = self._forget(number)
        if client is not None:
            self._emit(
                client.peer,
                Output(request=client.request, index=client.index, failure=reason[:2000]),
            )

    def _forget(self, number: int) -> _Client | None:
        client = self._clients.pop(number, None)
        if client is not None:
            del self._numbers[client.peer, client.request]
        return client

    async def run(self) -> None:
        """Send steps as the scheduler gives them, until cancelled."""
        with self.cancel_scope:
            while True:
                step = self._next_step()
                if step is None:
                    self._wake = trio.Event()
                    with trio.move_on_after(STEP_DEADLINE_S / 4):
                        await self._wake.wait()
                    self._check_deadline()
                else:
                    self._sent_at[step.number] = trio.current_time()
                    alone = len(self._sent_at) == 1
                    self._timings.sent(step.number, step.rows, alone=alone)
                    await self._feed(self._self_id, self._frame(step), self._body(step))
        self.close_session("the plan no longer has this pipeline")

    def _next_step(self) -> PlannedStep | None:
        if self._scheduler is None:
            return None
        step = self._scheduler.next_step()
        for number, reason in self._scheduler.take_refused():
            self._fail(number, reason)
        return step

    def _check_deadline(self) -> None:
        now = trio.current_time()
        oldest = min(self._sent_at.values(), default=None)
        if oldest is not None and now - oldest > STEP_DEADLINE_S:
            self.close_session(f"a step took longer than {STEP_DEADLINE_S:g} s")
        copy = self._scheduler.policy.oldest_copy() if self._scheduler else None
        if copy is None or copy != self._oldest_copy[0]:
            self._oldest_copy = copy, now
        elif now - self._oldest_copy[1] > STEP_DEADLINE_S:
            self.close_session(f"a copy of KV blocks took longer than {STEP_DEADLINE_S:g} s")

    def _frame(self, step: PlannedStep) -> Step:
        return Step(
            pipeline=self.pipeline.id,
            session=self._session,
            step=step.number,
            rows=step.rows,
            tensor=Tensor("i32", (len(step.tokens),)),
            openings=step.openings,
            grants=step.grants,
            releases=step.releases,
            store=step.store,
            load=step.load,
        )

    @staticmethod
    def _body(step: PlannedStep) -> Buffer:
        return array("i", step.tokens).tobytes()


class HeadHost:
    """All pipelines whose stage 0 is on this node."""

    def __init__(self, network: Network, feed: Feed) -> None:
        self._network = network
        self._feed = feed
        self._heads: dict[str, Head] = {}
        self._outboxes: dict[str, trio.MemorySendChannel[Output]] = {}
        self._nursery: trio.Nursery | None = None
        network.serve(SUBMIT, self._submit)

    @property
    def running(self) -> int:
        return sum(head.running for head in self._heads.values())

    @property
    def waiting(self) -> int:
        return sum(head.waiting for head in self._heads.values())

    def figures(self) -> dict[str, HeadFigures]:
        """What has been measured of every headed pipeline, by its id."""
        return {key: head.figures for key, head in self._heads.items()}

    def loads(self) -> dict[str, int]:
        """How many requests every headed pipeline holds, by its id."""
        return {key: head.running + head.waiting for key, head in self._heads.items()}

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            while True:
                await trio.sleep(HEARTBEAT_S)
                for head in list(self._heads.values()):
                    head.heartbeat()

    def apply(self, plan: Plan) -> None:
        """Follow a new plan: pipelines it keeps go on, others are closed or begun."""
        assert self._nursery is not None, "run must have started"
        me = self._network.peer_id
        wanted = {
            pipeline.id: pipeline
            for model in plan.models
            for pipeline in model.all_pipelines
            if pipeline.head == me
        }
        for key in self._heads.keys() - wanted.keys():
            self._heads.pop(key).cancel_scope.cancel()
        for key in wanted.keys() - self._heads.keys():
            head = Head(wanted[key], self._feed, self._emit, me)
            self._heads[key] = head
            self._nursery.start_soon(head.run)

    def follow(self, members: Members) -> None:
        """Look at the cluster anew; call it whenever a record or a member's state changed."""
        for head in self._heads.values():
            head.follow(members)

    def connection_lost(self, peer: str) -> None:
        """The network lost a peer for now; call `follow` afterwards to open new sessions."""
        for head in self._heads.values():
            head.connection_lost(peer)

    def peer_gone(self, peer: str) -> None:
        """`peer` is dead or has left: its requests are nobody's now."""
        outbox = self._outboxes.pop(peer, None)
        if outbox is not None:
            outbox.close()
        for head in self._heads.values():
            head.cancel_all_of(peer)

    async def _submit(self, peer: str, submission: Submission) -> Accepted:
        head = self._heads.get(submission.pipeline)
        if head is None:
            raise CallFailed("unknown-pipeline", "this node does not head that pipeline (any more)")
        return head.submit(peer, submission)

    def cancel(self, peer: str, frame: Cancel) -> None:
        for head in self._heads.values():
            head.cancel(peer, frame.request)

    def sampled(self, peer: str, frame: Sampled) -> None:
        head = self._heads.get(frame.pipeline)
        if head is not None and peer == head.pipeline.tail:
            head.sampled(frame)

    def copied(self, peer: str, frame: Copied) -> None:
        head = self._heads.get(frame.pipeline)
        nodes = [stage.node for stage in head.pipeline.stages] if head is not None else []
        if head is not None and peer in nodes:
            head.copied(nodes.index(peer), frame)

    def nack(self, peer: str, frame: Nack) -> None:
        head = self._heads.get(frame.pipeline)
        if head is not None and any(stage.node == peer for stage in head.pipeline.stages):
            head.nack(frame)

    def _emit(self, peer: str, output: Output) -> None:
        """Hand tokens to the ingress' own sender, so that a slow ingress holds back nobody else."""
        outbox = self._outboxes.get(peer)
        if outbox is None:
            assert self._nursery is not None
            outbox, queue = trio.open_memory_channel[Output](OUTBOX_FRAMES)
            self._outboxes[peer] = outbox
            self._nursery.start_soon(self._send_outputs, peer, queue)
        try:
            outbox.send_nowait(output)
        except trio.WouldBlock:
            log.warning("ingress %s does not keep up; its requests are dropped here", peer)
            self.peer_gone(peer)

    async def _send_outputs(self, peer: str, queue: "trio.MemoryReceiveChannel[Output]") -> None:
        async for output in queue:
            for pause in OUTPUT_RETRIES_S:
                try:
                    await self._network.send(peer, output)
                    break
                except NetworkError as error:
                    # Sending twice is harmless: tokens carry their index.
                    log.warning("cannot bring tokens to ingress %s: %s", peer, error)
                    await trio.sleep(pause)
            else:
                self.peer_gone(peer)
                return
