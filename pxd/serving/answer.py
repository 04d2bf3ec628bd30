"""One request of a client, brought home whatever fails on the way.

The ingress keeps prompt and generated token ids. Whatever fails (a stage, the head, a plan that is
superseded), it submits prompt + generated again and the client's stream goes on: sampling depends
on seed and position alone, so the answer is the one an undisturbed run gives.
"""

import contextlib
import logging
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator

import trio

from pxd.cluster.plans import ModelPlan, PipelinePlan
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.hashing import BlockHashes
from pxd.models.chat import ChatTokenizer
from pxd.p2p.network import CallFailed, NetworkError
from pxd.planning.routing.prefixes import LONGEST_PREFIX
from pxd.planning.routing.router import Wish
from pxd.serving.answertext import AnswerText
from pxd.serving.attempts import Attempt, Lives
from pxd.serving.dispatch import Dispatch
from pxd.serving.failures import Fault, fault_of
from pxd.serving.head import ONE_AT_A_TIME, Submission
from pxd.serving.readiness import readiness
from pxd.serving.requests import (
    Delta,
    Generation,
    GenerationFailed,
    InvalidRequest,
    NotReady,
    Overloaded,
    RequestError,
)
from pxd.serving.router import find_model
from pxd.serving.terms import Terms
from pxd.wire import MAX_TIMEOUT_S, Output, Sampling

log = logging.getLogger("pxd.serving.ingress")

DEFAULT_MAX_TOKENS = 4096
# Four of the head's heartbeats.
STALL_S = 20.0
PATIENCE_S = 120.0
HOPELESS_S = 30.0
"""How long an answer without a token waits when all that could serve it is lost: a node that was
killed and is started again may be back by then, and in a part that is cut off nothing changes."""
WORD_S = 1.0
"""How long after the deadline the head may still say why it was not kept."""

RETRY_S = (0.05, 0.2, 0.5, 1.0)
MAX_EXECUTOR_DEATHS = 2
MAX_FRUITLESS = 15
MAX_MOVES = 3
"""So often without a token it leaves a node that does not answer; then it waits for it."""


class _NotItsTurn(NotReady):
    """The head tries another request first that an executor died over."""


class ChatAnswer:
    """See `pxd.serving.requests.Answer`."""

    def __init__(
        self,
        dispatch: Dispatch,
        model: ModelPlan,
        tokenizer: ChatTokenizer,
        prompt: list[int],
        generation: Generation,
        sampling: Sampling,
        eos: tuple[int, ...],
        room: int,
        terms: Terms,
    ) -> None:
        self.id = secrets.token_hex(12)
        self.model = model.name
        self.prompt_tokens = len(prompt)
        self.recoveries = 0
        self._dispatch = dispatch
        self._router = dispatch.router(model.name)
        self._tokens = list(prompt)
        self._hashes = BlockHashes(model.fingerprint.encode(), BLOCK_TOKENS)
        self._fingerprint = model.fingerprint
        self._room = room
        self._terms = terms
        self._wanted = generation.max_tokens
        self._limit = 0
        self._eos = eos
        self._sampling = sampling
        self._text = AnswerText(tokenizer, generation.stop, prompt)
        self._attempt: Attempt | None = None
        self._attempts = 0
        self._pipeline = ""
        self._failures: Counter[str] = Counter()
        # Since its last token.
        self._fruitless = self._moves = 0
        self._deaths: set[tuple[str, Lives]] = set()

    @property
    def _generated(self) -> int:
        return len(self._tokens) - self.prompt_tokens

    @property
    def _prefix(self) -> list[bytes]:
        blocks = min(len(self._tokens) // BLOCK_TOKENS, LONGEST_PREFIX)
        return self._hashes.of(self._tokens, blocks)

    async def __aenter__(self) -> "ChatAnswer":
        return self

    async def __aexit__(self, *exc_info: object) -> None:
        self._drop_attempt(cancel=True)

    def _drop_attempt(self, *, cancel: bool) -> None:
        attempt, self._attempt = self._attempt, None
        if attempt is not None:
            self._dispatch.close(attempt, cancel=cancel)
            if attempt.fruitful:
                # The next turn of a conversation begins with the answer, too.
                self._router.remember(self._prefix, attempt.pipeline)

    async def place(self, patience: float, *, first: bool = False) -> None:
        """Submit what there is so far to a ready pipeline; wait for one for `patience` seconds.

        Where one has no room, all others are tried before anybody waits; a new request is refused
        then, and it does not wait long where nothing can serve, unless its client has said how
        long it can wait: then it waits until that is over. Raises `NotReady`, `InvalidRequest`,
        `UnknownModel`, `GenerationFailed`, `DeadlineExceeded`.
        """
        began = trio.current_time()
        tries = 0
        tried: set[str] = set()
        while True:
            changed = self._dispatch.changed.event
            self._pipeline = ""
            try:
                await self._submit()
                return
            except NotReady as error:
                if self._pipeline and self._pipeline not in tried:
                    tried.add(self._pipeline)
                    if self._ready_pipelines() - tried:
                        continue
                tries += 1
                if first and isinstance(error, Overloaded):
                    raise
                hope = math.inf if self._terms.patient else min(patience, self._hope())
                if trio.current_time() >= began + hope:
                    raise
                waits = 1 if isinstance(error, _NotItsTurn) else tries
                pause = RETRY_S[min(waits, len(RETRY_S)) - 1]
                if self._terms.left <= pause:
                    raise self._terms.over(str(error)) from error
            with trio.move_on_after(pause):
                await changed.wait()

    def _ready_pipelines(self) -> set[str]:
        members = self._dispatch.members()
        pipelines = find_model(self._dispatch.plan(), self.model).all_pipelines
        return {each.id for each in pipelines if readiness(each, members).ready}

    def _hope(self) -> float:
        """How many seconds of waiting make sense, as the plan is."""
        if self._generated:
            return math.inf
        plan, members = self._dispatch.plan(), self._dispatch.members()
        models = (model for model in (plan.models if plan else ()) if model.name == self.model)
        lines = (line for model in models for line in model.all_pipelines)
        return HOPELESS_S if all(readiness(line, members).lost for line in lines) else math.inf

    def _set_limit(self, pipeline: PipelinePlan) -> None:
        """Once, at the first placement: a replay must end where the first try would have."""
        if self._wanted is not None:
            self._limit = min(self._wanted, self._room)
            return
        kv_tokens = readiness(pipeline, self._dispatch.members()).kv_tokens
        kv_room = kv_tokens // BLOCK_TOKENS * BLOCK_TOKENS - self.prompt_tokens
        self._limit = min(DEFAULT_MAX_TOKENS, self._room, max(kv_room, 1))

    def _open_attempt(self) -> Attempt:
        model = find_model(self._dispatch.plan(), self.model)
        if model.fingerprint != self._fingerprint:
            raise GenerationFailed(f"{self.model} was replaced by other weights of the same name")
        wish = Wish(session=self._terms.session, prefix=self._prefix, failures=self._failures)
        most = self.prompt_tokens + (self._limit or min(self._wanted or 1, self._room))
        self._attempts += 1
        name = f"{self.id}.{self._attempts}"
        self._attempt, pipeline = self._dispatch.open(name, model, wish, most)
        self._attempt.stays = self._moves >= MAX_MOVES
        self._pipeline = pipeline.id
        if not self._limit:
            self._set_limit(pipeline)
        return self._attempt

    async def _submit(self) -> None:
        timeout = min(self._terms.left, MAX_TIMEOUT_S)
        if timeout <= 0:
            raise self._terms.over("it could not be submitted in time")
        attempt = self._open_attempt()
        submission = Submission(
            pipeline=attempt.pipeline,
            request=attempt.name,
            tokens=tuple(self._tokens),
            generated=self._generated,
            max_new=self._limit - self._generated,
            sampling=self._sampling,
            eos=self._eos,
            priority=self._terms.priority,
            timeout=timeout,
            client=self._terms.client,
            suspect=bool(self._deaths),
        )
        try:
            taken = await self._dispatch.submit(attempt, submission)
        except CallFailed as error:
            self._drop_attempt(cancel=False)
            raise self._refused(attempt, error) from error
        except NetworkError as error:
            self._blame(attempt)
            # The head may have taken the request all the same.
            self._drop_attempt(cancel=True)
            raise NotReady(f"the head of the pipeline cannot be reached: {error}") from error
        except BaseException:
            self._drop_attempt(cancel=True)
            raise
        if not taken:
            self._drop_attempt(cancel=True)
            raise NotReady("the head of the pipeline did not answer")

    def _refused(self, attempt: Attempt, error: CallFailed) -> RequestError:
        """What it means that the head took no request."""
        if error.code == ONE_AT_A_TIME:
            return _NotItsTurn(str(error))
        fault = fault_of(error.code)
        if fault == "client":
            return InvalidRequest(str(error), param="max_tokens")
        if fault == "busy":
            self._failures[attempt.pipeline] += 1
        else:
            self._blame(attempt)
        if error.code == "overloaded":
            return Overloaded(str(error))
        return NotReady(f"the head of the pipeline refused: {error}", retry_after=2)

    def _blame(self, attempt: Attempt) -> None:
        self._failures[attempt.pipeline] += 1
        now = trio.current_time()
        self._router.failed(attempt.pipeline, attempt.began, now)
        if self._router.circuit(attempt.pipeline, now) == "open":
            log.warning("pipeline %s fails again and again: others come first", attempt.pipeline)

    async def _recover(self, attempt: Attempt, reason: str) -> None:
        self._drop_attempt(cancel=True)
        fault = fault_of(reason)
        if fault == "time" or self._terms.left <= 0:
            raise self._terms.over(f"{reason}, with {self._generated} tokens generated")
        if fault == "reader":
            raise GenerationFailed(reason)
        if fault == "silence" and self._moves < MAX_MOVES:
            self._moves += 1
            pause = 0.0
        else:
            self._count_failure(attempt, fault, reason)
            pause = RETRY_S[min(self._fruitless, len(RETRY_S)) - 1]
        self.recoveries += 1
        log.warning("request %s goes on after a failure (%s)", self.id, reason)
        await trio.sleep(pause)
        try:
            await self._place_again()
        except GenerationFailed:
            raise
        except RequestError as error:
            if isinstance(error, NotReady) and not self._generated:
                raise
            raise GenerationFailed(f"{reason}; then: {error}") from error
        log.info("request %s is on pipeline %s now", self.id, self._pipeline)

    def _count_failure(self, attempt: Attempt, fault: Fault, reason: str) -> None:
        """Raises `GenerationFailed` for one too many."""
        self._blame(attempt)
        if fault == "executor" and not attempt.fruitful:
            self._deaths.add((attempt.pipeline, attempt.lives))
        if len(self._deaths) >= MAX_EXECUTOR_DEATHS:
            raise GenerationFailed(f"gave up after {len(self._deaths)} executor deaths: {reason}")
        self._fruitless += 1
        if self._fruitless > MAX_FRUITLESS:
            raise GenerationFailed(
                f"gave up after {MAX_FRUITLESS} attempts without a token: {reason}"
            )

    async def _place_again(self) -> None:
        if not self._deaths:
            await self.place(PATIENCE_S)
            return
        with trio.move_on_at(self._terms.deadline):
            async with self._dispatch.suspects(self.model):
                await self.place(PATIENCE_S)
                return
        raise self._terms.over("others that an executor died over went first")

    async def _next_output(self, attempt: Attempt) -> Output:
        with contextlib.suppress(trio.WouldBlock):
            # For who reads slowly, all may be here though the time is over.
            return attempt.get_nowait()
        patience = max(min(STALL_S, self._terms.left + WORD_S), 0.0)
        with trio.move_on_after(patience):
            return await attempt.get()
        return Output(request=attempt.name, index=0, failure=f"no word for {patience:g} s")

    async def __aiter__(self) -> AsyncIterator[Delta]:
        while True:
            attempt = self._attempt
            if attempt is None:
                raise GenerationFailed("the answer was left already")
            output = await self._next_output(attempt)
            if output.failure is not None or output.index > self._generated:
                if self._generated >= self._limit:
                    # All tokens are here; only the word that it was the last one was lost.
                    self._drop_attempt(cancel=True)
                    yield self._text.add((), (), "length")
                    return
                await self._recover(attempt, output.failure or "tokens were lost on the way")
                continue
            delta = self._take(attempt, output)
            if delta.finish is not None:
                self._drop_attempt(cancel=output.finish is None)
                yield delta
                return
            if delta.tokens:
                yield delta

    def _take(self, attempt: Attempt, output: Output) -> Delta:
        """Go on with what is new in `output`: tokens that are here already came twice."""
        new = slice(self._generated - output.index, self._limit - output.index)
        fresh = output.tokens[new]
        self._tokens.extend(fresh)
        if fresh:
            self._fruitless = self._moves = 0
            self._deaths.clear()
            if not attempt.fruitful:
                attempt.fruitful = True
                self._router.succeeded(attempt.pipeline, attempt.began)
                self._router.remember(self._prefix, attempt.pipeline)
        logprobs = () if self._sampling.logprobs is None else output.logprobs[new]
        return self._text.add(fresh, logprobs, output.finish)
