"""POST /v1/chat/completions: one answer, whole or as server-sent events.

A client that disconnects leaves its answer's context at once, which cancels it on every node.
"""

import hashlib
import secrets
import time
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from typing import Any

import msgspec
import trio
from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from pxd.api.body import read_json_body
from pxd.api.chat_request import ChatCall, parse_chat_request
from pxd.api.daemon import Daemon
from pxd.api.errors import from_request_error, json_response
from pxd.api.logprobs import logprobs_object
from pxd.serving.clients import Clients
from pxd.serving.requests import (
    Answer,
    Delta,
    GenerationFailed,
    RequestError,
    TokenLogprobs,
)
from pxd.wire import Finish

KEEP_ALIVE_S = 10.0
BEGIN_S = 40.0
"""Before that no comment begins a response, so that a failure is still an ordinary HTTP error."""

Begin = Callable[[], Awaitable[Answer]]

_SSE_HEADERS = [
    (b"content-type", b"text/event-stream; charset=utf-8"),
    (b"cache-control", b"no-cache"),
    (b"x-accel-buffering", b"no"),
]


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
    }


def _head(answer: Answer, kind: str) -> dict[str, Any]:
    return {
        "id": f"chatcmpl-{answer.id}",
        "object": kind,
        "created": int(time.time()),
        "model": answer.model,
    }


async def _while_connected(
    clients: Clients,
    receive: Receive,
    work: Callable[[], Awaitable[None]],
    writing: trio.Lock | None = None,
) -> bool:
    """Run `work` until it ends or the client is gone; say whether it ended.

    The request's body must have been read. Raises the `RequestError` that `work` raises, or one
    that says that this node leaves; `work` holds `writing` while it must not be cut off for that.
    """
    writing = writing or trio.Lock()
    failure: RequestError | None = None
    ended = False
    with clients.request():
        async with trio.open_nursery() as nursery:

            async def watch() -> None:
                while (await receive())["type"] != "http.disconnect":
                    pass
                nursery.cancel_scope.cancel()

            async def part() -> None:
                nonlocal failure
                over = await clients.wait_over()
                async with writing:
                    failure = over
                    nursery.cancel_scope.cancel()

            nursery.start_soon(watch)
            nursery.start_soon(part)
            try:
                await work()
            except RequestError as error:
                failure = error
            ended = True
            nursery.cancel_scope.cancel()
    if failure is not None:
        raise failure
    return ended


class _WholeAnswer(Response):
    """Answers in one piece once everything is there."""

    def __init__(self, call: ChatCall, begin: Begin, clients: Clients) -> None:
        super().__init__()
        self._call = call
        self._begin = begin
        self._clients = clients
        self._whole = Response()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        # The response is sent outside: at its end the server says "disconnect", too.
        if await _while_connected(self._clients, receive, self._compute):
            await self._whole(scope, receive, send)

    async def _compute(self) -> None:
        call = self._call
        text: list[str] = []
        thoughts: list[str] = []
        logprobs: list[TokenLogprobs] = []
        tokens = 0
        finish: Finish | None = None
        async with await self._begin() as answer:
            async for delta in answer:
                text.append(delta.text)
                thoughts.append(delta.thought)
                logprobs += delta.logprobs
                tokens += delta.tokens
                finish = delta.finish
        if finish is None:
            raise GenerationFailed("the answer broke off")
        message = {"role": "assistant", "content": "".join(text), "refusal": None}
        if any(thoughts):
            message["reasoning_content"] = "".join(thoughts)
        choice = {
            "index": 0,
            "message": message,
            "logprobs": logprobs_object(logprobs) if call.wants_logprobs else None,
            "finish_reason": finish,
        }
        completion = {
            **_head(answer, "chat.completion"),
            "choices": [choice],
            "usage": _usage(answer.prompt_tokens, tokens),
        }
        # Bytes take far less while they wait for the client than what they are made from.
        self._whole = json_response(completion)


class _Events:
    """Writes server-sent events. The response begins with the first of them."""

    def __init__(self, send: Send) -> None:
        self._send = send
        self.turn = trio.Lock()
        self.began = False
        self._last = trio.current_time()

    async def write(self, data: bytes) -> None:
        try:
            self.turn.acquire_nowait()
        except trio.WouldBlock:
            await self.turn.acquire()
        try:
            # Later than here it would cost the connection.
            await trio.lowlevel.checkpoint_if_cancelled()
            if not self.began:
                self.began = True
                start = {"type": "http.response.start", "status": 200, "headers": _SSE_HEADERS}
                await self._send(start)
            await self._send({"type": "http.response.body", "body": data, "more_body": True})
            self._last = trio.current_time()
        finally:
            self.turn.release()

    async def keep_alive(self, work: Callable[[], Awaitable[None]]) -> None:
        """Run `work`; whenever it has been silent for long, write a comment."""
        failure: RequestError | None = None
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._break_silence)
            try:
                await work()
            except RequestError as error:
                failure = error
            # A comment that is being written is never cut off.
            async with self.turn:
                nursery.cancel_scope.cancel()
        if failure is not None:
            raise failure

    async def _break_silence(self) -> None:
        while True:
            due = self._last + (KEEP_ALIVE_S if self.began else BEGIN_S)
            if trio.current_time() >= due:
                await self.write(b": keep-alive\n\n")
            else:
                await trio.sleep_until(min(due, trio.current_time() + KEEP_ALIVE_S))

    async def event(self, content: dict[str, Any]) -> None:
        await self.write(b"data: " + msgspec.json.encode(content) + b"\n\n")

    async def end(self) -> None:
        await self._send({"type": "http.response.body", "body": b"", "more_body": False})


class _Chunks:
    """Puts the pieces of one answer into OpenAI's chunk objects."""

    def __init__(self, answer: Answer, events: _Events, *, include_usage: bool) -> None:
        self._head = _head(answer, "chat.completion.chunk")
        self._prompt_tokens = answer.prompt_tokens
        self._events = events
        self._include_usage = include_usage
        self._tokens = 0
        self._began = False

    async def add(self, delta: Delta) -> None:
        self._tokens += delta.tokens
        if not self._began:
            self._began = True
            await self._choice({"role": "assistant", "content": ""})
        piece = {"reasoning_content": delta.thought} if delta.thought else {}
        if delta.text or (delta.logprobs and not piece):
            piece["content"] = delta.text
        if piece:
            await self._choice(piece, logprobs=delta.logprobs)
        if delta.finish is not None:
            await self._choice({}, delta.finish)
            await self._finish()

    async def _choice(
        self,
        delta: dict[str, str],
        finish: Finish | None = None,
        logprobs: Sequence[TokenLogprobs] = (),
    ) -> None:
        choice = {
            "index": 0,
            "delta": delta,
            "logprobs": logprobs_object(logprobs) if logprobs else None,
            "finish_reason": finish,
        }
        chunk = {**self._head, "choices": [choice]}
        if self._include_usage:
            chunk["usage"] = None
        await self._events.event(chunk)

    async def _finish(self) -> None:
        if self._include_usage:
            usage = _usage(self._prompt_tokens, self._tokens)
            await self._events.event({**self._head, "choices": [], "usage": usage})
        await self._events.write(b"data: [DONE]\n\n")


class _StreamedAnswer(Response):
    """Answers piece by piece.

    What fails before the first piece is an ordinary HTTP error, which clients know how to retry;
    what fails later is a last event, and `[DONE]` stays away.
    """

    def __init__(self, call: ChatCall, begin: Begin, clients: Clients) -> None:
        super().__init__()
        self._call = call
        self._begin = begin
        self._clients = clients

    async def __call__(self, _: Scope, receive: Receive, send: Send) -> None:
        events = _Events(send)
        work = partial(events.keep_alive, partial(self._relay, events))
        try:
            if not await _while_connected(self._clients, receive, work, events.turn):
                return
        except RequestError as error:
            if not events.began:
                raise
            await events.event(from_request_error(error).body())
        await events.end()

    async def _relay(self, events: _Events) -> None:
        call = self._call
        finish: Finish | None = None
        async with await self._begin() as answer:
            chunks = _Chunks(answer, events, include_usage=call.include_usage)
            async for delta in answer:
                finish = delta.finish
                await chunks.add(delta)
        if finish is None:
            raise GenerationFailed("the answer broke off")


class ChatCompletions:
    """The endpoint."""

    def __init__(self, daemon: Daemon) -> None:
        self._daemon = daemon
        self._salt = secrets.token_bytes(16)

    async def __call__(self, request: Request) -> Response:
        call = parse_chat_request(await read_json_body(request))
        kind = _StreamedAnswer if call.stream else _WholeAnswer
        begin = partial(
            self._daemon.ingress.chat,
            call.model,
            call.messages,
            call.generation,
            self._client(request, call.user),
            request.headers.get("x-session-id", "") or call.user,
        )
        return kind(call, begin, self._daemon.clients)

    def _client(self, request: Request, user: str) -> str:
        """A name for whoever takes turns with others; other nodes learn nothing else from it."""
        address = request.client.host if request.client else ""
        told = "\0".join((address, request.headers.get("authorization", ""), user))
        return hashlib.blake2b(told.encode(), digest_size=8, key=self._salt).hexdigest()
