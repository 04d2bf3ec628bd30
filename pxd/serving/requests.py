"""What services and faces say to each other about a request. Nothing here knows HTTP."""

from collections.abc import AsyncIterator
from typing import Any, Literal, Protocol

import msgspec

from pxd.wire import Finish


class RequestError(Exception):
    """Base of everything that ends a request early. The message is meant for the client."""


class InvalidRequest(RequestError):
    """The client's fault; `param` names the field."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code


class UnknownModel(RequestError):
    """No such model is served by this cluster."""


class NotReady(RequestError):
    """No pipeline can take the request now. `retry_after` in seconds."""

    def __init__(self, message: str, retry_after: int = 5) -> None:
        super().__init__(message)
        self.retry_after = retry_after


class Overloaded(NotReady):
    """As many requests wait as may."""


class GenerationFailed(RequestError):
    """The cluster accepted the request and could not bring it home."""


class DeadlineExceeded(GenerationFailed):
    """The time that the request was given is over."""


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """How to answer. `max_tokens` None means up to the model's context, within the server's cap.

    `temperature`, `top_p`, `top_k` and `min_p` None mean what the model's own
    generation_config.json says, else 1, 1, 0 (off) and 0 (off). `seed` None lets the ingress draw
    one. `stop` strings and `stop_token_ids` end the answer and are not part of it; before
    `min_tokens` tokens no end-of-sequence token and none of `stop_token_ids` can be drawn, but a
    stop string still ends the answer. A request of a lower `priority` goes first. The answer must
    be complete within `timeout` seconds; None, or more than that, means the daemon's own limit.
    `template_options` are variables for the model's chat template. The rest is as in
    `pxd.wire.Sampling`.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()
    logprobs: int | None = None
    min_tokens: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    seed: int | None = None
    priority: int = 0
    timeout: float | None = None
    template_options: dict[str, Any] = {}


class ScoredPiece(msgspec.Struct, frozen=True):
    """A token's own bytes, which need not be whole characters, and its log probability."""

    piece: bytes
    logprob: float


class TokenLogprobs(msgspec.Struct, frozen=True):
    """A token of the answer, and the likeliest at its place, likeliest first."""

    token: ScoredPiece
    top: tuple[ScoredPiece, ...]


class Delta(msgspec.Struct, frozen=True):
    """A piece of the answer. `tokens` counts the tokens behind it; `finish` is set on the last.

    Text may lag behind tokens (an unfinished character, a possible stop string): a delta with
    empty text and tokens > 0 is normal. `logprobs`, if asked for, are of the tokens that begin in
    the text so far and were not in an earlier delta. `thought` is what a thinking model thinks: it
    comes before all text.
    """

    text: str
    tokens: int
    finish: Finish | None = None
    logprobs: tuple[TokenLogprobs, ...] = ()
    thought: str = ""


class Answer(Protocol):
    """An accepted request. Iterate to its end, or leave the context to cancel it everywhere.

    `model` is the served model's full name and `prompt_tokens` the length of the templated prompt.
    Iteration raises `GenerationFailed`, `DeadlineExceeded`, or `NotReady` where nothing has been
    generated. `recoveries` counts resubmissions
    after failures.
    """

    id: str
    model: str
    prompt_tokens: int
    recoveries: int

    def __aiter__(self) -> AsyncIterator[Delta]: ...

    async def __aenter__(self) -> "Answer": ...

    async def __aexit__(self, *exc_info: object) -> None: ...


class Ingress(Protocol):
    async def chat(
        self,
        model: str | None,
        messages: tuple[Message, ...],
        generation: Generation,
        client: str = "",
        session: str = "",
    ) -> Answer:
        """Template, tokenise and route a chat. Model None means the one being served.

        Clients, told apart by a name of at most 32 characters, take turns. Requests of one
        `session` go to one pipeline as far as that makes sense. Raises `UnknownModel`,
        `InvalidRequest`, `NotReady`, `Overloaded`, `DeadlineExceeded`.
        """
