"""Owns the requests that clients gave to this node, and brings every one of them home.

The ingress keeps prompt and generated token ids. Whatever fails on the way (a stage, the head, a
plan that is superseded), it submits prompt + generated again and the client's stream goes on:
sampling depends on seed and position alone, so the answer is the one an undisturbed run gives.
"""

import contextlib
import logging
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable
from typing import TypeVar

import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan, Plan
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.models.chat import ChatTokenizer
from pxd.models.errors import ModelError
from pxd.p2p.network import CallFailed, Network, NetworkError
from pxd.serving.answertext import AnswerText
from pxd.serving.head import SUBMIT, Submission
from pxd.serving.models import ModelSource
from pxd.serving.readiness import Members, readiness
from pxd.serving.requests import (
    Delta,
    Generation,
    GenerationFailed,
    InvalidRequest,
    Message,
    NotReady,
    Overloaded,
    RequestError,
)
from pxd.serving.router import find_model, pick_pipeline, refuse_stopped
from pxd.serving.signal import Signal
from pxd.serving.terms import Terms
from pxd.settings import DEFAULT_REQUEST_TIMEOUT_S
from pxd.wire import MAX_TIMEOUT_S, Cancel, Output, Sampling

log = logging.getLogger("pxd.serving.ingress")

Number = TypeVar("Number", int, float)

DEFAULT_MAX_TOKENS = 4096
SUBMIT_TIMEOUT_S = 10.0
# Four of the head's heartbeats.
STALL_S = 60.0
PATIENCE_S = 120.0
HOPELESS_S = 5.0
RECENTLY_S = 60.0
WORD_S = 1.0
"""How long after the deadline the head may still say why it was not kept."""

RETRY_S = (0.05, 0.2, 0.5, 1.0)
MAX_EXECUTOR_DEATHS = 3
MAX_FRUITLESS = 15
STRAY_S = 5.0
MAX_STRAYS = 1024
MAX_REFUSING = 64


class _Attempt:
    """One submission of a request to one head."""

    def __init__(self, name: str, head: str, started: float) -> None:
        self.name = name
        self.head = head
        self.started = started
        self.lost = False
        # Not a leak: at most max_new tokens ever come, and the client pays for reading slowly.
        self.send, self.outputs = trio.open_memory_channel[Output](math.inf)

    def fail(self, reason: str) -> None:
        if self.lost:
            return
        self.lost = True
        self.send.send_nowait(Output(request=self.name, index=0, failure=reason))


class ChatIngress:
    """The node's requests. `plan` and `members` give the present view, `changed` its changes."""

    def __init__(
        self,
        network: Network,
        models: ModelSource,
        plan: Callable[[], Plan | None],
        members: Callable[[], Members],
        changed: Signal,
        request_timeout: float = DEFAULT_REQUEST_TIMEOUT_S,
    ) -> None:
        self.network = network
        self.models = models
        self.plan = plan
        self.members = members
        self.changed = changed
        self._request_timeout = request_timeout
        self._attempts: dict[str, _Attempt] = {}
        self._ready: set[str] = set()
        self._ready_until: dict[str, float] = {}
        self._strays: dict[str, float] = {}
        self._refusing = 0
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                # Answers that are left during the daemon's own end cancel nothing any more.
                self._nursery = None

    def apply(self, plan: Plan) -> None:
        """Follow a new plan: have its tokenizers ready before somebody asks."""
        if self._nursery is not None:
            for model in plan.models:
                self._nursery.start_soon(self._prepare, model.name)

    async def _prepare(self, name: str) -> None:
        try:
            await self.models.tokenizer(name)
        except ModelError as error:
            log.warning("this node cannot take requests for %s: %s", name, error)

    async def chat(
        self,
        model: str | None,
        messages: tuple[Message, ...],
        generation: Generation,
        client: str = "",
    ) -> "ChatAnswer":
        terms = Terms(generation, client, self._request_timeout)
        with trio.move_on_at(terms.deadline):
            return await self._begin(model, messages, generation, terms)
        raise terms.over("no pipeline had taken it")

    async def _begin(
        self,
        model: str | None,
        messages: tuple[Message, ...],
        generation: Generation,
        terms: Terms,
    ) -> "ChatAnswer":
        planned = find_model(self.plan(), model)
        refuse_stopped(planned)
        if not self._worth_waiting(planned):
            pick_pipeline(planned, self.members())
        try:
            tokenizer = await self.models.tokenizer(planned.name)
        except ModelError as error:
            raise NotReady(f"this node cannot take requests for {planned.name}: {error}") from error
        _check_tokens(planned.name, tokenizer, generation)
        try:
            prompt = await trio.to_thread.run_sync(tokenizer.encode_chat, messages)
        except ModelError as error:
            raise InvalidRequest(str(error), param="messages") from error
        room = planned.context - len(prompt)
        if room < 1:
            raise InvalidRequest(
                f"the conversation is {len(prompt)} tokens long, "
                f"but {planned.name} has a context of {planned.context} tokens",
                param="messages",
                code="context_length_exceeded",
            )
        answer = ChatAnswer(self, planned, tokenizer, prompt, generation, room, terms)
        await answer.place(PATIENCE_S if self._worth_waiting(planned) else 0.0, first=True)
        return answer

    def _worth_waiting(self, model: ModelPlan) -> bool:
        """A model that served a moment ago will soon again: a pause is better than an error."""
        if model.name in self._ready:
            return True
        return trio.current_time() - self._ready_until.get(model.name, -math.inf) < RECENTLY_S

    def follow(self) -> None:
        """Look at the cluster anew: attempts whose head is gone or was restarted are lost."""
        members = self.members()
        plan = self.plan()
        ready = {
            model.name
            for model in (plan.models if plan else ())
            if any(readiness(pipeline, members).ready for pipeline in model.all_pipelines)
        }
        now = trio.current_time()
        self._ready_until.update(dict.fromkeys(self._ready - ready, now))
        self._ready = ready
        for attempt in self._attempts.values():
            head = members.get(attempt.head)
            if head is None or head.state in ("dead", "left"):
                attempt.fail("its head is gone")
            elif head.record.started != attempt.started:
                attempt.fail("its head was restarted")

    def connection_lost(self, peer: str) -> None:
        """The network lost a peer for now: what a head there has sent may be lost too."""
        for attempt in self._attempts.values():
            if attempt.head == peer:
                attempt.fail("unreachable: lost the connection to the head")

    def output(self, peer: str, frame: Output) -> None:
        attempt = self._attempts.get(frame.request)
        if attempt is None:
            if frame.finish is None and frame.failure is None:
                self._refuse_stray(peer, frame.request)
        elif attempt.head == peer:
            attempt.send.send_nowait(frame)

    def _refuse_stray(self, peer: str, request: str) -> None:
        """A head works for nobody: the cancellation was lost, or was faster than the submission."""
        now = trio.current_time()
        if now - self._strays.get(request, -math.inf) < STRAY_S or self._nursery is None:
            return
        if self._refusing >= MAX_REFUSING:
            # It will come again if it is real.
            return
        if len(self._strays) >= MAX_STRAYS:
            self._strays.clear()
        self._strays[request] = now
        self._refusing += 1
        self._nursery.start_soon(self._refuse, peer, request)

    async def _refuse(self, peer: str, request: str) -> None:
        try:
            await self._cancel(peer, request)
        finally:
            self._refusing -= 1

    def open_attempt(self, name: str, head: str) -> _Attempt:
        attempt = _Attempt(name, head, self.members()[head].record.started)
        self._attempts[name] = attempt
        return attempt

    def close_attempt(self, attempt: _Attempt, *, cancel: bool) -> None:
        self._attempts.pop(attempt.name, None)
        if cancel and self._nursery is not None:
            self._nursery.start_soon(self._cancel, attempt.head, attempt.name)

    async def _cancel(self, head: str, request: str) -> None:
        try:
            with trio.move_on_after(SUBMIT_TIMEOUT_S):
                await self.network.send(head, Cancel(request=request))
        except NetworkError as error:
            log.info("could not cancel %s at its head: %s", request, error)


class ChatAnswer:
    """See `pxd.serving.requests.Answer`."""

    def __init__(
        self,
        ingress: ChatIngress,
        model: ModelPlan,
        tokenizer: ChatTokenizer,
        prompt: list[int],
        generation: Generation,
        room: int,
        terms: Terms,
    ) -> None:
        self.id = secrets.token_hex(12)
        self.model = model.name
        self.prompt_tokens = len(prompt)
        self.recoveries = 0
        self._ingress = ingress
        self._tokens = list(prompt)
        self._fingerprint = model.fingerprint
        self._room = room
        self._terms = terms
        self._wanted = generation.max_tokens
        self._limit = 0
        self._eos = tuple(dict.fromkeys((*tokenizer.eos, *generation.stop_token_ids)))
        self._sampling = _sampling(generation, tokenizer, len(prompt), self._eos)
        self._text = AnswerText(tokenizer, generation.stop)
        self._attempt: _Attempt | None = None
        self._attempts = 0
        self._pipeline = ""
        self._failures: Counter[str] = Counter()
        self._fruitless = 0
        self._executor_deaths = 0

    @property
    def _generated(self) -> int:
        return len(self._tokens) - self.prompt_tokens

    async def __aenter__(self) -> "ChatAnswer":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._drop_attempt(cancel=True)

    def _drop_attempt(self, *, cancel: bool) -> None:
        if self._attempt is not None:
            self._ingress.close_attempt(self._attempt, cancel=cancel)
            self._attempt = None

    async def place(self, patience: float, *, first: bool = False) -> None:
        """Submit what there is so far to a ready pipeline; wait for one for `patience` seconds.

        A new request does not wait long for a model that the plan has no pipeline for. Raises
        `NotReady`, `InvalidRequest`, `UnknownModel`, `GenerationFailed`, `DeadlineExceeded`.
        """
        began = trio.current_time()
        tries = 0
        while True:
            changed = self._ingress.changed.event
            try:
                await self._submit()
                return
            except NotReady as error:
                tries += 1
                if first and isinstance(error, Overloaded) and tries >= self._choices():
                    raise
                if trio.current_time() >= began + min(patience, self._hope(first=first)):
                    raise
                pause = RETRY_S[min(tries, len(RETRY_S)) - 1]
                if self._terms.left <= pause:
                    raise self._terms.over(str(error)) from error
            with trio.move_on_after(pause):
                await changed.wait()

    def _choices(self) -> int:
        """How many pipelines may take the request."""
        return len(find_model(self._ingress.plan(), self.model).all_pipelines)

    def _hope(self, *, first: bool) -> float:
        """How many seconds of waiting make sense, as the plan is."""
        plan = self._ingress.plan()
        planned = any(model.all_pipelines for model in (plan.models if plan else ()))
        return HOPELESS_S if first and not planned else math.inf

    def _set_limit(self, pipeline: PipelinePlan) -> None:
        """Once, at the first placement: a replay must end where the first try would have."""
        if self._wanted is not None:
            self._limit = min(self._wanted, self._room)
            return
        kv_tokens = readiness(pipeline, self._ingress.members()).kv_tokens
        kv_room = kv_tokens // BLOCK_TOKENS * BLOCK_TOKENS - self.prompt_tokens
        self._limit = min(DEFAULT_MAX_TOKENS, self._room, max(kv_room, 1))

    async def _submit(self) -> None:
        timeout = min(self._terms.left, MAX_TIMEOUT_S)
        if timeout <= 0:
            raise self._terms.over("it could not be submitted in time")
        model = find_model(self._ingress.plan(), self.model)
        if model.fingerprint != self._fingerprint:
            raise GenerationFailed(f"{self.model} was replaced by other weights of the same name")
        pipeline = pick_pipeline(model, self._ingress.members(), self._failures)
        self._pipeline = pipeline.id
        if not self._limit:
            self._set_limit(pipeline)
        self._attempts += 1
        attempt = self._ingress.open_attempt(f"{self.id}.{self._attempts}", pipeline.head)
        self._attempt = attempt
        submission = Submission(
            pipeline=pipeline.id,
            request=attempt.name,
            tokens=tuple(self._tokens),
            generated=self._generated,
            max_new=self._limit - self._generated,
            sampling=self._sampling,
            eos=self._eos,
            priority=self._terms.priority,
            timeout=timeout,
            client=self._terms.client,
        )
        try:
            await self._ingress.network.call(
                pipeline.head, SUBMIT, submission, timeout=SUBMIT_TIMEOUT_S
            )
        except CallFailed as error:
            self._failures[pipeline.id] += 1
            self._drop_attempt(cancel=False)
            if error.code == "never-fits":
                raise InvalidRequest(str(error), param="max_tokens") from error
            if error.code == "overloaded":
                raise Overloaded(str(error)) from error
            raise NotReady(f"the head of the pipeline refused: {error}", retry_after=2) from error
        except NetworkError as error:
            self._failures[pipeline.id] += 1
            # The head may have taken the request all the same.
            self._drop_attempt(cancel=True)
            raise NotReady(f"the head of the pipeline cannot be reached: {error}") from error
        except BaseException:
            self._drop_attempt(cancel=True)
            raise

    async def _recover(self, reason: str) -> None:
        self._failures[self._pipeline] += 1
        self._drop_attempt(cancel=True)
        if self._terms.left <= 0:
            raise self._terms.over(f"{reason}, with {self._generated} tokens generated")
        self._executor_deaths += reason.startswith("executor-died")
        if self._executor_deaths >= MAX_EXECUTOR_DEATHS:
            raise GenerationFailed(
                f"gave up after {self._executor_deaths} executor deaths: {reason}"
            )
        self._fruitless += 1
        if self._fruitless > MAX_FRUITLESS:
            raise GenerationFailed(
                f"gave up after {MAX_FRUITLESS} attempts without a token: {reason}"
            )
        self.recoveries += 1
        log.warning("request %s goes on after a failure (%s)", self.id, reason)
        await trio.sleep(RETRY_S[min(self._fruitless, len(RETRY_S)) - 1])
        try:
            await self.place(PATIENCE_S)
        except GenerationFailed:
            raise
        except RequestError as error:
            raise GenerationFailed(f"{reason}; then: {error}") from error

    async def _next_output(self) -> Output:
        attempt = self._attempt
        if attempt is None:
            raise GenerationFailed("the answer was left already")
        with contextlib.suppress(trio.WouldBlock):
            # For who reads slowly, all may be here though the time is over.
            return attempt.outputs.receive_nowait()
        patience = max(min(STALL_S, self._terms.left + WORD_S), 0.0)
        with trio.move_on_after(patience):
            return await attempt.outputs.receive()
        return Output(request=attempt.name, index=0, failure=f"no word for {patience:g} s")

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            output = await self._next_output()
            if output.failure is not None or output.index > self._generated:
                if self._generated >= self._limit:
                    # All tokens are here; only the word that it was the last one was lost.
                    self._drop_attempt(cancel=True)
                    yield self._text.add((), (), "length")
                    return
                await self._recover(output.failure or "tokens were lost on the way")
                continue
            known = self._generated - output.index
            fresh = output.tokens[known:]
            self._tokens.extend(fresh)
            if fresh:
                self._fruitless = self._executor_deaths = 0
            logprobs = () if self._sampling.logprobs is None else output.logprobs[known:]
            delta = self._text.add(fresh, logprobs, output.finish)
            if delta.finish is not None:
                self._drop_attempt(cancel=output.finish is None)
                yield delta
                return
            if fresh:
                yield delta


def _check_tokens(model: str, tokenizer: ChatTokenizer, generation: Generation) -> None:
    """Raises `InvalidRequest` for token ids that the model's tokenizer does not know."""
    for field, tokens in (
        ("logit_bias", [token for token, _ in generation.logit_bias]),
        ("stop_token_ids", generation.stop_token_ids),
    ):
        for token in tokens:
            if not tokenizer.knows(token):
                raise InvalidRequest(
                    f"{field}: {model} has no token {token}", param=field, code="unknown_token"
                )


def _sampling(
    generation: Generation, tokenizer: ChatTokenizer, prompt: int, eos: tuple[int, ...]
) -> Sampling:
    seed = secrets.randbits(63) if generation.seed is None else generation.seed
    return Sampling(
        temperature=_or(generation.temperature, tokenizer.temperature),
        top_p=_or(generation.top_p, tokenizer.top_p),
        top_k=_or(generation.top_k, tokenizer.top_k),
        min_p=_or(generation.min_p, tokenizer.min_p),
        seed=seed & ((1 << 63) - 1),
        repetition_penalty=generation.repetition_penalty,
        presence_penalty=generation.presence_penalty,
        frequency_penalty=generation.frequency_penalty,
        logit_bias=generation.logit_bias,
        min_length=prompt + generation.min_tokens if generation.min_tokens else 0,
        barred=eos if generation.min_tokens else (),
        logprobs=generation.logprobs,
    )


def _or(value: Number | None, default: Number) -> Number:
    return default if value is None else value
