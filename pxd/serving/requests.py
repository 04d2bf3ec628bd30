"""What services and faces say to each other about a request. Nothing here knows HTTP."""

from collections.abc import AsyncIterator
from typing import Literal, Protocol

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


class GenerationFailed(RequestError):
    """The cluster accepted the request and could not bring it home within its deadline."""


class Message(msgspec.Struct, frozen=True):
    role: Literal["system", "developer", "user", "assistant"]
    content: str


class Generation(msgspec.Struct, frozen=True, kw_only=True):
    """How to answer. `max_tokens` None means up to the model's context, within the server's cap.

    `temperature` and `top_p` None mean what the model's own generation_config.json says, else 1.
    `seed` None lets the ingress draw one. `stop` strings end the answer and are not part of it.
    """

    max_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    stop: tuple[str, ...] = ()
    seed: int | None = None


class Delta(msgspec.Struct, frozen=True):
    """A piece of the answer. `tokens` counts the tokens behind it; `finish` is set on the last.

    Text may lag behind tokens (an unfinished character, a possible stop string): a delta with
    empty text and tokens > 0 is normal.
    """

    text: str
    tokens: int
    finish: Finish | None = None


class Answer(Protocol):
    """An accepted request. Iterate to its end, or leave the context to cancel it everywhere.

    `model` is the served model's full name and `prompt_tokens` the length of the templated prompt.
    Iteration raises `GenerationFailed`. `recoveries` counts resubmissions after failures.
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
        self, model: str | None, messages: tuple[Message, ...], generation: Generation
    ) -> Answer:
        """Template, tokenise and route a chat. Model None means the one being served.

        Raises `UnknownModel`, `InvalidRequest`, `NotReady`.
        """
