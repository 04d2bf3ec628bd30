"""What a chat completion request may say.

Unknown fields are ignored, as clients send fields of many dialects. Known fields must have values
that mean something here: a field that would change the answer is refused, never dropped silently.
Beyond OpenAI's own fields there are vLLM's, such as `chat_template_kwargs`, and `timeout`, which is
LiteLLM's: the answer must be complete within so many seconds.
"""

import re
from collections.abc import Callable
from typing import Annotated, Any, Literal

import msgspec
from msgspec import Meta

from pxd.serving.requests import Generation, InvalidRequest, Message
from pxd.wire import MAX_BIASES, MAX_LOGPROBS, Name, Priority, Timeout, TokenId

_SEED_BITS = 63
_PLACE = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
# No leading zeros: one token has one name, so no two keys mean the same.
_TOKEN_ID = re.compile(r"0|[1-9][0-9]{0,8}")
_MISSING = re.compile(r"missing required field `(?P<field>[^`]*)`")

StopString = Annotated[str, Meta(min_length=1, max_length=1024)]
TokenCount = Annotated[int, Meta(ge=1, lt=1 << 31)]
Penalty = Annotated[float, Meta(ge=-2, le=2)]
Bias = Annotated[float, Meta(ge=-100, le=100)]


class ContentPart(msgspec.Struct):
    type: str
    text: str | None = None


class ChatMessage(msgspec.Struct):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | Annotated[list[ContentPart], Meta(min_length=1, max_length=4096)]
    tool_calls: list[Any] | None = None
    function_call: Any = None


class StreamOptions(msgspec.Struct):
    include_usage: bool | None = None


class ResponseFormat(msgspec.Struct):
    type: str


class ChatRequest(msgspec.Struct, kw_only=True):
    """The body of POST /v1/chat/completions; null means the same as absence."""

    messages: Annotated[list[ChatMessage], Meta(min_length=1, max_length=8192)]
    model: Name | None = None
    temperature: Annotated[float, Meta(ge=0, le=2)] | None = None
    top_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    max_tokens: TokenCount | None = None
    max_completion_tokens: TokenCount | None = None
    top_k: Annotated[int, Meta(ge=-1, lt=1 << 31)] | None = None
    min_p: Annotated[float, Meta(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Meta(ge=0.01, le=100)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    logit_bias: Annotated[dict[str, Bias], Meta(max_length=MAX_BIASES)] | None = None
    logprobs: bool | None = None
    top_logprobs: Annotated[int, Meta(ge=0, le=MAX_LOGPROBS)] | None = None
    min_tokens: Annotated[int, Meta(ge=0, lt=1 << 31)] | None = None
    stop_token_ids: Annotated[list[TokenId], Meta(max_length=64)] | None = None
    stop: StopString | Annotated[list[StopString], Meta(max_length=4)] | None = None
    seed: Annotated[int, Meta(ge=-(1 << 63), le=(1 << 63) - 1)] | None = None
    priority: Priority | None = None
    timeout: Timeout | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    chat_template_kwargs: Annotated[dict[Name, Any], Meta(max_length=32)] | None = None
    user: str | None = None

    # Known to OpenAI's clients and not offered here: only values that change nothing are taken.
    n: Annotated[int, Meta(ge=1, le=128)] | None = None
    response_format: ResponseFormat | None = None
    tools: list[Any] | None = None
    tool_choice: Any = None
    functions: list[Any] | None = None
    function_call: Any = None
    modalities: list[str] | None = None
    audio: Any = None
    web_search_options: Any = None
    reasoning_effort: str | None = None
    verbosity: str | None = None


class ChatCall(msgspec.Struct, frozen=True):
    """A valid request, in the words of the services. `model` None means the one being served.

    `user` is who the client says is asking.
    """

    model: str | None
    messages: tuple[Message, ...]
    generation: Generation
    stream: bool
    include_usage: bool
    user: str

    @property
    def wants_logprobs(self) -> bool:
        return self.generation.logprobs is not None


def _never(_: Any) -> bool:
    return False


_CHANGES_NOTHING: dict[str, Callable[[Any], bool]] = {
    "n": lambda n: n == 1,
    "response_format": lambda wanted: wanted.type == "text",
    "tools": lambda tools: not tools,
    "tool_choice": lambda choice: choice in ("none", "auto"),
    "functions": lambda functions: not functions,
    "function_call": lambda choice: choice in ("none", "auto"),
    "modalities": lambda modalities: modalities == ["text"],
    "audio": _never,
    "web_search_options": _never,
    "reasoning_effort": lambda effort: effort == "none",
    "verbosity": lambda verbosity: verbosity == "medium",
}

_decoder = msgspec.json.Decoder(ChatRequest)


def _invalid(error: msgspec.ValidationError) -> InvalidRequest:
    """msgspec's message, with the place it names as the error's `param`."""
    text = str(error)
    place = _PLACE.search(text)
    # An entry of a map has no name of its own there.
    path = place["path"].removesuffix("[...]") if place else ""
    text = _PLACE.sub("", text)
    if missing := _MISSING.search(text):
        path = f"{path}.{missing['field']}" if path else missing["field"]
    return InvalidRequest(f"{path}: {text}" if path else text, param=path or None)


def _refuse_unsupported(request: ChatRequest) -> None:
    for field, changes_nothing in _CHANGES_NOTHING.items():
        value = getattr(request, field)
        if value is not None and not changes_nothing(value):
            raise InvalidRequest(
                f"{field}: this value is not supported by pxd",
                param=field,
                code="unsupported_parameter",
            )


def _text(content: str | list[ContentPart], place: str) -> str:
    if isinstance(content, str):
        return content
    for number, part in enumerate(content):
        where = f"{place}.content[{number}]"
        if part.type != "text":
            raise InvalidRequest(
                f"{where}: parts of type {part.type[:64]!r} are not supported by pxd, only 'text'",
                param=where,
                code="unsupported_content",
            )
        if part.text is None:
            raise InvalidRequest(f"{where}: a text part needs `text`", param=f"{where}.text")
    return "".join(part.text or "" for part in content)


def _message(message: ChatMessage, place: str) -> Message:
    if message.tool_calls or message.function_call is not None:
        field = "tool_calls" if message.tool_calls else "function_call"
        raise InvalidRequest(
            f"{place}.{field}: tools are not supported by pxd",
            param=f"{place}.{field}",
            code="unsupported_parameter",
        )
    return Message(message.role, _text(message.content, place))


def _logit_bias(biases: dict[str, float]) -> tuple[tuple[int, float], ...]:
    for key in biases:
        if not _TOKEN_ID.fullmatch(key):
            raise InvalidRequest(
                f"logit_bias: keys are token ids in decimal digits, and {key[:64]!r} is none",
                param="logit_bias",
            )
    return tuple((int(key), bias) for key, bias in biases.items())


def _logprobs(request: ChatRequest) -> int | None:
    if request.logprobs:
        return request.top_logprobs or 0
    if request.top_logprobs:
        raise InvalidRequest(
            "top_logprobs: it needs `logprobs` to be true as well", param="top_logprobs"
        )
    return None


def _generation(request: ChatRequest) -> Generation:
    stop = [request.stop] if isinstance(request.stop, str) else request.stop or []
    seed = request.seed
    max_tokens = request.max_completion_tokens or request.max_tokens
    min_tokens = request.min_tokens or 0
    if max_tokens is not None and min_tokens > max_tokens:
        raise InvalidRequest(
            f"min_tokens: {min_tokens} is more than max_tokens, which is {max_tokens}",
            param="min_tokens",
        )
    return Generation(
        max_tokens=max_tokens,
        temperature=request.temperature,
        top_p=request.top_p,
        # As in vLLM, -1 means all, like 0; None leaves it to the model.
        top_k=None if request.top_k is None else max(request.top_k, 0),
        min_p=request.min_p,
        repetition_penalty=_or(request.repetition_penalty, 1.0),
        presence_penalty=_or(request.presence_penalty, 0.0),
        frequency_penalty=_or(request.frequency_penalty, 0.0),
        logit_bias=_logit_bias(request.logit_bias or {}),
        logprobs=_logprobs(request),
        min_tokens=min_tokens,
        stop=tuple(stop),
        stop_token_ids=tuple(request.stop_token_ids or ()),
        # OpenAI's seeds are signed, pxd's are not; which number it is matters to nobody.
        seed=None if seed is None else seed % (1 << _SEED_BITS),
        priority=request.priority or 0,
        timeout=request.timeout,
        template_options=request.chat_template_kwargs or {},
    )


def _or(value: float | None, default: float) -> float:
    return default if value is None else value


def parse_chat_request(body: bytes) -> ChatCall:
    """Raises `InvalidRequest`, with `param` naming the field where there is one."""
    try:
        request = _decoder.decode(body)
    except msgspec.ValidationError as error:
        raise _invalid(error) from error
    except (msgspec.DecodeError, UnicodeDecodeError) as error:
        raise InvalidRequest(f"The request body is not valid JSON: {error}") from error
    except RecursionError as error:
        raise InvalidRequest("The request body is nested too deeply") from error
    _refuse_unsupported(request)
    options = request.stream_options
    return ChatCall(
        model=request.model or None,
        messages=tuple(
            _message(message, f"messages[{number}]")
            for number, message in enumerate(request.messages)
        ),
        generation=_generation(request),
        stream=bool(request.stream),
        include_usage=bool(options and options.include_usage),
        user=request.user or "",
    )
