"""The bytes of a streamed answer, and what keeps its connection alive."""

import json
from typing import Any

import httpx
import trio
import trio.testing

from pxd.api.app import create_app
from pxd.api.chat import BEGIN_S
from pxd.serving.requests import Delta, GenerationFailed, NotReady

from .fakes import FakeDaemon, LiveServer, Step

BODY = {"messages": [{"role": "user", "content": "hi"}], "stream": True}


def events(text: str) -> list[str]:
    assert text.endswith("\n\n")
    return text.removesuffix("\n\n").split("\n\n")


def test_the_bytes(server: LiveServer) -> None:
    response = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
    assert response.status_code == 200
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events(response.text)
    assert done == "data: [DONE]"
    contents = [json.loads(chunk.removeprefix("data: ")) for chunk in chunks]
    assert {content["object"] for content in contents} == {"chat.completion.chunk"}
    assert [content["choices"] for content in contents] == [
        [{"index": 0, "delta": delta, "logprobs": None, "finish_reason": finish}]
        for delta, finish in [
            ({"role": "assistant", "content": ""}, None),
            ({"content": "hi"}, None),
            ({}, "stop"),
        ]
    ]
    assert all("usage" not in content for content in contents)


def test_a_failed_stream_ends_without_done(server: LiveServer) -> None:
    server.daemon.ingress.scripts.append([Delta("a", 1), GenerationFailed("gone")])
    response = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
    last = events(response.text)[-1]
    assert json.loads(last.removeprefix("data: ")) == {
        "error": {
            "message": "gone",
            "type": "server_error",
            "param": None,
            "code": "generation_failed",
        }
    }
    assert "[DONE]" not in response.text


def test_text_of_any_script_survives(server: LiveServer) -> None:
    text = "naïve 日本\n\ndata: [DONE]\r\n🙂"
    server.daemon.ingress.scripts.append([Delta(text, 1, "stop")])
    response = httpx.post(f"{server.url}/v1/chat/completions", json=BODY)
    content = json.loads(events(response.text)[1].removeprefix("data: "))
    assert content["choices"][0]["delta"]["content"] == text


class Asgi:
    """One streamed request straight into the app, so that time can be a mock clock's."""

    def __init__(self, daemon: FakeDaemon) -> None:
        self._app = create_app(daemon)
        self.received: list[tuple[float, dict[str, Any]]] = []

    async def run(self) -> None:
        body = json.dumps(BODY).encode()
        scope = {
            "type": "http",
            "method": "POST",
            "path": "/v1/chat/completions",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json")],
        }
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive() -> dict[str, Any]:
            if not messages:
                await trio.sleep_forever()
            return messages.pop()

        async def send(message: dict[str, Any]) -> None:
            self.received.append((trio.current_time(), message))

        await self._app(scope, receive, send)

    @property
    def pieces(self) -> list[tuple[float, bytes]]:
        return [(at, message["body"]) for at, message in self.received if message.get("body")]


async def run_with_pauses(
    autojump_clock: trio.testing.MockClock, script: list[tuple[float, Step]]
) -> Asgi:
    """Run a script of (seconds since the beginning, step)."""
    daemon = FakeDaemon()
    begin = trio.current_time()
    steps: list[Step] = []
    async with trio.open_nursery() as nursery:

        async def set_at(at: float, event: trio.Event) -> None:
            await trio.sleep_until(begin + at)
            event.set()

        for at, step in script:
            event = trio.Event()
            nursery.start_soon(set_at, at, event)
            steps += [event, step]
        daemon.ingress.scripts.append(steps)
        request = Asgi(daemon)
        await request.run()
    request.received = [(at - begin, message) for at, message in request.received]
    return request


async def test_silence_is_filled_with_comments(autojump_clock: trio.testing.MockClock) -> None:
    request = await run_with_pauses(
        autojump_clock, [(65, Delta("a", 1)), (71, Delta("b", 1)), (82, Delta("", 0, "stop"))]
    )
    comment = b": keep-alive\n\n"
    assert [at for at, piece in request.pieces if piece == comment] == [40, 50, 60, 81]
    assert request.pieces[0] == (BEGIN_S, comment)
    assert request.pieces[-1] == (82, b"data: [DONE]\n\n")


async def test_tokens_without_text_do_not_count_as_speech(
    autojump_clock: trio.testing.MockClock,
) -> None:
    pauses = [(float(at), Delta("", 1)) for at in range(0, 24, 3)]
    request = await run_with_pauses(autojump_clock, [*pauses, (25, Delta("a", 0, "stop"))])
    # The first token begins the answer.
    assert [at for at, piece in request.pieces if piece.startswith(b":")] == [10, 20]


async def test_a_failure_after_a_comment_is_an_event(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = await run_with_pauses(autojump_clock, [(45, NotReady("the head went away"))])
    assert request.received[0][1]["status"] == 200
    assert b"the head went away" in request.pieces[-1][1]
    assert request.received[-1][1] == {
        "type": "http.response.body",
        "body": b"",
        "more_body": False,
    }


async def test_a_failure_before_the_first_comment_is_an_ordinary_error(
    autojump_clock: trio.testing.MockClock,
) -> None:
    request = await run_with_pauses(autojump_clock, [(35, NotReady("all are gone"))])
    assert request.received[0][1]["status"] == 503
    assert dict(request.received[0][1]["headers"])[b"retry-after"] == b"5"
