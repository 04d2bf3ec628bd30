"""Drives one pipeline: its head schedules every step and hands the tokens to their ingresses.

A *session* is one life of a pipeline's scheduler. It begins when all stages are ready and ends when
one is not: then every request in it is given up, with the reason, and its ingress brings it home
some other way. The stages forget a session when they see the next one.
"""

import logging
import math
import secrets
from array import array
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Annotated

import msgspec
import trio

from pxd.cluster.plans import PipelinePlan
from pxd.cluster.records import KvBlocks
from pxd.engine.continuous import Admission, Continuous, ContinuousConfig
from pxd.engine.history import has_penalties
from pxd.engine.scheduler import (
    Generated,
    NeverFits,
    NewRequest,
    PlannedStep,
    QueueFull,
    Scheduler,
)
from pxd.p2p.network import CallFailed, Method
from pxd.serving.quota import Quota
from pxd.serving.readiness import Members, Readiness, readiness
from pxd.serving.speculation import Speculate, Speculation
from pxd.serving.timings import HeadFigures, LonePass, PipelineTimings
from pxd.wire import (
    MAX_ENDS,
    MAX_HISTORY,
    MAX_TIMEOUT_S,
    Buffer,
    Copied,
    Count,
    Identifier,
    Nack,
    Output,
    Priority,
    Sampled,
    Sampling,
    Step,
    Tensor,
    Timeout,
    TokenId,
)

log = logging.getLogger("pxd.serving.head")

STEP_DEADLINE_S = 300.0
PACE_S = 0.25
"""How long a step's share of prompts may hold up those who wait for their next token."""

CAUTION_S, MOST_CAUTION = 600.0, 3
"""Executors that die in a step have often been out of memory, and systems seldom say so. For so
long, sessions begin with smaller steps after a death, and with smaller ones still after the next.
"""

LEAST_PREFILL = 64
MAX_REQUESTS = 8192
MAX_TOKENS = 1 << 23
"""Of all requests as they were submitted. A token takes some 36 bytes."""

ONE_AT_A_TIME = "one-at-a-time"

Feed = Callable[[str, Step, Buffer], Awaitable[None]]
FeedNow = Callable[[Step, Buffer], bool]


class Submission(msgspec.Struct, frozen=True, kw_only=True):
    """A request for a pipeline's head. The last `generated` of `tokens` are answer already.

    Within `timeout` seconds of its arrival it must be done: clocks of nodes need not agree. A peer
    may tell its clients apart by `client`, so that they take turns in what the peer gets. A
    `suspect` was there, without a token, when an executor died: it may have been its doing.
    """

    pipeline: Identifier
    request: Identifier
    tokens: Annotated[tuple[TokenId, ...], msgspec.Meta(min_length=1, max_length=1_000_000)]
    generated: Count
    max_new: Annotated[int, msgspec.Meta(ge=1, lt=1 << 31)]
    sampling: Sampling
    eos: Annotated[tuple[TokenId, ...], msgspec.Meta(max_length=MAX_ENDS)]
    priority: Priority = 0
    timeout: Timeout = MAX_TIMEOUT_S
    client: Annotated[str, msgspec.Meta(max_length=32)] = ""
    suspect: bool = False


class Accepted(msgspec.Struct, frozen=True):
    """How many requests the head holds, this one included."""

    load: Count


SUBMIT: Method[Submission, Accepted] = Method("head.submit", Submission, Accepted)


class _Client:
    """Where a request's tokens go: its ingress and the name it has there; what it counts for."""

    __slots__ = ("index", "peer", "request", "tokens")

    def __init__(self, peer: str, submission: Submission) -> None:
        self.peer, self.request = peer, submission.request
        self.index = submission.generated
        self.tokens = len(submission.tokens)


class Head:
    """One pipeline. Owned by `HeadHost`, which runs `run`."""

    def __init__(
        self,
        pipeline: PipelinePlan,
        feed: Feed,
        emit: Callable[[str, Output], None],
        self_id: str,
        admission: Admission,
        speculate: Speculate,
        feed_now: FeedNow = lambda *_: False,
    ) -> None:
        """`feed_now` takes a step if that needs no waiting, else it is given to `feed`."""
        self.pipeline = pipeline
        self.cancel_scope = trio.CancelScope()
        self.reason = "the pipeline is being set up"
        self._feed = feed
        self._feed_now = feed_now
        self._held: tuple[Step, Buffer] | None = None
        self._emit = emit
        self._self_id = self_id
        self._admission: Admission = admission
        self._scheduler: Scheduler | None = None
        self._policy = Continuous(ContinuousConfig(kv_tokens=0))
        self._session = 0
        self._next_request = 0
        self._clients: dict[int, _Client] = {}
        self._numbers: dict[tuple[str, str], int] = {}
        self._names: dict[str, str] = {}
        self._suspect: int | None = None
        self._requests, self._tokens = Quota(MAX_REQUESTS), Quota(MAX_TOKENS)
        self._sent_at: dict[int, float] = {}
        self._oldest_copy: tuple[int | None, float] = None, 0.0
        self._deaths: deque[float] = deque(maxlen=MOST_CAUTION)
        self._timings = PipelineTimings()
        self._speculation = Speculation(speculate)
        self._wake = trio.Event()
        self._sooner = trio.Event()

    @property
    def running(self) -> int:
        return self._scheduler.running if self._scheduler else 0

    @property
    def waiting(self) -> int:
        return self._scheduler.waiting if self._scheduler else 0

    @property
    def blocks(self) -> KvBlocks | None:
        """None while it has no session."""
        pool = self._policy.pool
        return KvBlocks(pool.capacity, pool.free, pool.idle) if self._scheduler else None

    @property
    def figures(self) -> HeadFigures:
        return self._timings.figures

    def follow(self, members: Members) -> None:
        """Open or close the session as the stages' reports demand."""
        state = readiness(self.pipeline, members)
        self.reason = state.reason
        stages = (stage.node for stage in self.pipeline.stages)
        self._names = {node: members[node].record.name for node in stages if node in members}
        self._speculation.stages_are(decode_s=state.decode_s, possible=state.trims)
        if state.ready and self._scheduler is None:
            self._open(state)
        elif not state.ready and self._scheduler is not None:
            died = "executor-died: " if "restarting" in state.states else ""
            self.close_session(died + state.reason)

    def _open(self, state: Readiness) -> None:
        config = ContinuousConfig(
            kv_tokens=state.kv_tokens,
            max_in_flight=len(self.pipeline.stages),
            admission=self._admission,
            prefix_cache=state.prefix_cache,
            stages=len(self.pipeline.stages),
            tier_slots=state.tier_slots,
            root=self.pipeline.id.encode(),
        )
        self._policy = Continuous(config)
        now = trio.current_time()
        # Twice for each: a request is given up after the second death.
        for _ in range(2 * sum(now - death < CAUTION_S for death in self._deaths)):
            self._policy.be_careful()
        self._scheduler = Scheduler(self._policy)
        self._scheduler.greet()
        self._session = secrets.randbits(47)
        self._wake.set()
        self._timings = PipelineTimings()
        self._policy.guesses = self._speculation.most()
        log.info(
            "pipeline %s serves: %d KV token positions, %d blocks in the second tier",
            self.pipeline.id,
            state.kv_tokens,
            state.tier_slots,
        )

    def close_session(self, reason: str) -> None:
        """Give every request back to its ingress, which may submit it again elsewhere."""
        if reason.startswith("executor-died") and self._sent_at:
            self._deaths.append(trio.current_time())
        # These were in no step, so no executor died over them.
        queued = set(self._scheduler.queued) if self._scheduler else set()
        self._scheduler = None
        self._held = None
        self._sent_at.clear()
        self._oldest_copy = None, 0.0
        if self._clients:
            log.warning(
                "pipeline %s gives up %d requests: %s", self.pipeline.id, len(self._clients), reason
            )
        for number in list(self._clients):
            self._fail(number, f"not begun: {reason}" if number in queued else reason)

    def submit(self, peer: str, submission: Submission) -> Accepted:
        """Raises `CallFailed` with code not-ready, duplicate, overloaded, never-fits or
        one-at-a-time: of suspects, the next is taken when the one before has got a token, so that
        no other one shares its fate."""
        scheduler = self._scheduler
        if scheduler is None:
            raise CallFailed("not-ready", self.reason)
        if (peer, submission.request) in self._numbers:
            raise CallFailed("duplicate", "the head already has a request of this name")
        if submission.suspect and self._suspect in self._clients:
            raise CallFailed(ONE_AT_A_TIME, "another request that an executor died over goes first")
        longest = len(submission.tokens) + submission.max_new
        if has_penalties(submission.sampling) and longest > MAX_HISTORY:
            raise CallFailed(
                "never-fits",
                f"with penalties, prompt and answer may take {MAX_HISTORY} tokens, not {longest}",
            )
        self._claim(peer, len(submission.tokens))
        try:
            return self._accept(scheduler, peer, submission)
        except CallFailed:
            self._unclaim(peer, len(submission.tokens))
            raise

    def _claim(self, peer: str, tokens: int) -> None:
        if not self._requests.take(peer, 1):
            raise CallFailed("overloaded", "this pipeline holds too many requests already")
        if not self._tokens.take(peer, tokens):
            self._requests.give_back(peer, 1)
            raise CallFailed("overloaded", "this pipeline's requests are too long to take another")

    def _unclaim(self, peer: str, tokens: int) -> None:
        self._requests.give_back(peer, 1)
        self._tokens.give_back(peer, tokens)

    def _accept(self, scheduler: Scheduler, peer: str, submission: Submission) -> Accepted:
        number, now = self._next_request, trio.current_time()
        request = NewRequest(
            number=number,
            tokens=submission.tokens,
            max_new=submission.max_new,
            sampling=submission.sampling,
            generated=submission.generated,
            eos=frozenset(submission.eos),
            priority=submission.priority,
            source=peer,
            client=submission.client,
            deadline=now + submission.timeout,
        )
        soonest = scheduler.next_deadline
        try:
            scheduler.add(request)
        except NeverFits as error:
            raise CallFailed("never-fits", str(error)) from error
        except QueueFull as error:
            raise CallFailed("overloaded", str(error)) from error
        self._next_request += 1
        self._timings.submitted(now, number, len(submission.tokens), alone=not self._clients)
        self._clients[number] = _Client(peer, submission)
        self._numbers[peer, submission.request] = number
        if submission.suspect:
            self._suspect = number
        self._wake.set()
        if request.deadline < soonest:
            self._sooner.set()
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
            lone = self._timings.returned(trio.current_time(), frame.step, sent, results)
            self._keep_pace(lone)
        # The stages are not to wait until clients have been told.
        self._send_what_can_be()
        for result in results:
            self._deliver(result)
        self._wake.set()

    def copied(self, stage: int, frame: Copied) -> None:
        if self._scheduler is None or frame.session != self._session:
            return
        self._scheduler.copied(frame.event, stage, frame.failed)
        self._wake.set()

    def _keep_pace(self, lone: LonePass | None) -> None:
        if lone is not None:
            self._speculation.passed(lone)
            self._policy.guesses = self._speculation.most()
        positions = self._timings.positions_within(PACE_S)
        if positions is not None:
            most = self._policy.config.step_tokens
            self._policy.mixed_tokens = min(max(positions, LEAST_PREFILL), most)

    def nack(self, frame: Nack, peer: str = "") -> None:
        """A step failed at the stage of `peer`."""
        if self._scheduler is None or frame.session != self._session:
            return
        name = self._names.get(peer, "")
        reason = f"{frame.code}: {name}{': ' if name else ''}{frame.reason}"
        if frame.code == "executor-died":
            self.close_session(reason)
            return
        self._sent_at.pop(frame.step, None)
        starved = frame.code == "out-of-memory"
        failed = self._scheduler.step_failed(frame.step, frame.requests, starved=starved)
        if starved and not failed:
            log.warning("pipeline %s goes on with smaller steps: %s", self.pipeline.id, reason)
        for number in failed:
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
        if result.tokens and result.request == self._suspect:
            self._suspect = None
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
            self._unclaim(client.peer, client.tokens)
        return client

    async def run(self) -> None:
        """Send steps as the scheduler gives them, until cancelled."""
        with self.cancel_scope:
            async with trio.open_nursery() as nursery:
                nursery.start_soon(self._watch_deadlines)
                await self._send_steps()
        self.close_session("the plan no longer has this pipeline")

    async def _send_steps(self) -> None:
        while True:
            self._send_what_can_be()
            if self._held is not None:
                await self._feed(self._self_id, *self._held)
                self._held = None
                continue
            self._wake = trio.Event()
            with trio.move_on_after(STEP_DEADLINE_S / 4):
                await self._wake.wait()
            self._check_progress()

    def _send_what_can_be(self) -> None:
        """All steps that there are, up to one that would have to wait, which is held."""
        while self._held is None:
            step = self._next_step()
            if step is None:
                return
            self._sent_at[step.number] = trio.current_time()
            alone = len(self._sent_at) == 1
            self._timings.sent(step.number, step.rows, alone=alone)
            frame, body = self._frame(step), self._body(step)
            if not self._feed_now(frame, body):
                self._held = frame, body
                self._wake.set()

    async def _watch_deadlines(self) -> None:
        """A task of its own, since sending may take as long as a step does."""
        while True:
            self._expire()
            self._sooner = trio.Event()
            due = self._scheduler.next_deadline if self._scheduler else math.inf
            with trio.move_on_at(due):
                await self._sooner.wait()

    def _expire(self) -> None:
        scheduler, now = self._scheduler, trio.current_time()
        if scheduler is None or now < scheduler.next_deadline:
            return
        queued = set(scheduler.queued)
        for number in scheduler.expire(now):
            state = "waiting for its turn" if number in queued else "being worked on"
            self._fail(number, f"deadline: its time was over while it was {state}")
        self._wake.set()

    def _next_step(self) -> PlannedStep | None:
        if self._scheduler is None:
            return None
        step = self._scheduler.next_step()
        for number, reason in self._scheduler.take_refused():
            self._fail(number, reason)
        return step

    def _check_progress(self) -> None:
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
