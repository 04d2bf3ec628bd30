"""Takes the requests that clients give to this node; `pxd.serving.answer` brings them home."""

import logging
import math
import secrets
from collections.abc import Callable
from typing import TypeVar

import trio

from pxd.cluster.plans import ModelPlan, Plan
from pxd.models.chat import ChatTokenizer, OptionRefused
from pxd.models.errors import ModelError
from pxd.p2p.network import Network
from pxd.serving.answer import PATIENCE_S, ChatAnswer
from pxd.serving.dispatch import Dispatch
from pxd.serving.models import ModelSource
from pxd.serving.readiness import Members, readiness
from pxd.serving.requests import Generation, InvalidRequest, Message, NotReady
from pxd.serving.router import find_model, pipeline_states, refuse_stopped
from pxd.serving.signal import Signal
from pxd.serving.terms import Terms
from pxd.settings import DEFAULT_REQUEST_TIMEOUT_S
from pxd.wire import Output, Sampling

log = logging.getLogger("pxd.serving.ingress")

Number = TypeVar("Number", int, float)

RECENTLY_S = 60.0


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
        self.models = models
        self.plan = plan
        self.members = members
        self._dispatch = Dispatch(network, plan, members, changed)
        self._request_timeout = request_timeout
        self._ready: set[str] = set()
        self._ready_until: dict[str, float] = {}
        self._nursery: trio.Nursery | None = None

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        async with trio.open_nursery() as nursery:
            await nursery.start(self._dispatch.attempts.run)
            nursery.start_soon(self._dispatch.leave_silent)
            self._nursery = nursery
            task_status.started()
            try:
                await trio.sleep_forever()
            finally:
                self._nursery = None

    def apply(self, plan: Plan) -> None:
        """Follow a new plan: have its tokenizers ready before somebody asks."""
        self._dispatch.apply(plan)
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
        session: str = "",
    ) -> ChatAnswer:
        terms = Terms(generation, client, self._request_timeout, session)
        with trio.move_on_at(terms.deadline):
            return await self._begin(model, messages, generation, terms)
        raise terms.over(terms.obstacle)

    async def _begin(
        self,
        model: str | None,
        messages: tuple[Message, ...],
        generation: Generation,
        terms: Terms,
    ) -> ChatAnswer:
        planned = await self._find(model, terms)
        try:
            tokenizer = await self.models.tokenizer(planned.name)
        except ModelError as error:
            raise NotReady(f"this node cannot take requests for {planned.name}: {error}") from error
        _check_tokens(planned.name, tokenizer, generation)
        try:
            prompt = await trio.to_thread.run_sync(
                tokenizer.encode_chat, messages, generation.template_options
            )
        except OptionRefused as error:
            raise InvalidRequest(str(error), param="chat_template_kwargs") from error
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
        eos = tuple(dict.fromkeys((*tokenizer.eos, *generation.stop_token_ids)))
        sampling = _sampling(generation, tokenizer, len(prompt), eos)
        answer = ChatAnswer(
            self._dispatch, planned, tokenizer, prompt, generation, sampling, eos, room, terms
        )
        await answer.place(PATIENCE_S if self._worth_waiting(planned) else 0.0, first=True)
        return answer

    async def _find(self, name: str | None, terms: Terms) -> ModelPlan:
        """The model of that name, as soon as it makes sense to ask for it."""
        while True:
            changed, plan = self._dispatch.changed.event, self.plan()
            try:
                planned = find_model(plan, name)
                refuse_stopped(planned)
                if not self._worth_waiting(planned):
                    pipeline_states(planned, self.members())
                return planned
            except NotReady as error:
                if not terms.patient or _is_hopeless(plan, name, self.members()):
                    raise
                terms.obstacle = str(error)
            await changed.wait()

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
        self._dispatch.attempts.follow(members)

    def connection_lost(self, peer: str) -> None:
        """The network lost a peer for now: what a head there has sent may be lost too."""
        self._dispatch.attempts.connection_lost(peer)

    def output(self, peer: str, frame: Output) -> None:
        self._dispatch.attempts.output(peer, frame)


def _is_hopeless(plan: Plan | None, name: str | None, members: Members) -> bool:
    """Whether a model that is not ready will not be so just because time passes."""
    if plan is None:
        return False
    if not plan.models:
        return True
    model = find_model(plan, name)
    states = [readiness(pipeline, members).states for pipeline in model.all_pipelines]
    return model.state == "failed" or (bool(states) and all("failed" in each for each in states))


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
