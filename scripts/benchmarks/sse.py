"""A chat completion as server-sent events, from a client that does little else than to listen."""

from collections.abc import Callable, Mapping
from typing import Any

import h11
import msgspec
import trio

from scripts.benchmarks.errors import BenchError

RECEIVE_BYTES = 65536
SHOWN_BYTES = 500


class Delta(msgspec.Struct):
    content: str | None = None


class Choice(msgspec.Struct):
    delta: Delta
    finish_reason: str | None = None


class Usage(msgspec.Struct):
    prompt_tokens: int
    completion_tokens: int


class Chunk(msgspec.Struct):
    id: str = ""
    choices: list[Choice] = []
    usage: Usage | None = None
    error: msgspec.Raw = msgspec.Raw()


class Refused(BenchError):
    """The server answered with an error instead of a stream. `retry_after` is empty unless it
    says when to try again."""

    def __init__(self, status: int, body: bytes, retry_after: str = "") -> None:
        super().__init__(f"HTTP {status}: {_shown(body)}")
        self.status, self.body, self.retry_after = status, body, retry_after


class BrokeOff(BenchError):
    """The stream said that it ends with an error; `body` is the error object."""

    def __init__(self, body: bytes) -> None:
        super().__init__(_shown(body))
        self.body = body


_chunks = msgspec.json.Decoder(Chunk)


def _shown(body: bytes) -> str:
    return body[:SHOWN_BYTES].decode(errors="replace")


class ChatStream:
    """One request on a connection of its own. `done` after the server has said `[DONE]`."""

    def __init__(self, connection: trio.SocketStream, host: str) -> None:
        self.done = False
        self._connection = connection
        self._host = host
        self._http = h11.Connection(h11.CLIENT)
        self._rest = b""

    async def run(self, body: Mapping[str, Any], add: Callable[[Chunk], None]) -> None:
        """Call `add` with each chunk as it comes, until the server ends the response.

        Raises `Refused`, `BrokeOff`, and what a connection that breaks raises:
        `trio.BrokenResourceError` or `h11.ProtocolError`.
        """
        await self._send("/v1/chat/completions", msgspec.json.encode(body))
        status, text, retry_after = 0, b"", b""
        while not isinstance(event := await self._event(), h11.EndOfMessage):
            if isinstance(event, h11.Response):
                status = event.status_code
                retry_after = dict(event.headers).get(b"retry-after", b"")
            elif isinstance(event, h11.ConnectionClosed):
                break
            elif isinstance(event, h11.Data) and status == 200:
                self._take(bytes(event.data), add)
            elif isinstance(event, h11.Data):
                text += event.data
        if status != 200:
            raise Refused(status, text, retry_after.decode())

    async def _send(self, path: str, body: bytes) -> None:
        headers = [
            ("host", self._host),
            ("content-type", "application/json"),
            ("content-length", str(len(body))),
            ("connection", "close"),
        ]
        request = h11.Request(method="POST", target=path, headers=headers)
        parts = (request, h11.Data(data=body), h11.EndOfMessage())
        await self._connection.send_all(b"".join(self._http.send(part) or b"" for part in parts))

    async def _event(self) -> h11.Event:
        while (event := self._http.next_event()) is h11.NEED_DATA:
            self._http.receive_data(await self._connection.receive_some(RECEIVE_BYTES))
        if not isinstance(event, h11.Event):
            raise BenchError("the server paused the connection")
        return event

    def _take(self, data: bytes, add: Callable[[Chunk], None]) -> None:
        *events, self._rest = (self._rest + data).split(b"\n\n")
        for event in events:
            if event.startswith(b"data: {"):
                chunk = _chunks.decode(event.removeprefix(b"data: "))
                if chunk.error:
                    raise BrokeOff(bytes(chunk.error))
                add(chunk)
            elif event == b"data: [DONE]":
                self.done = True
