"""Streams that start together, from a client that does little else than to take the time.

As a program it takes a `Load` in JSON and prints the `Result`: so it can run in another network
namespace.
"""

import statistics
import sys
from collections.abc import Sequence
from urllib.parse import urlsplit

import h11
import msgspec
import trio

from scripts.benchmarks.errors import BenchError
from scripts.benchmarks.sse import ChatStream, Chunk, Usage

TIMEOUT_S = 600.0


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """One stream per prompt, each of exactly `tokens` tokens, greedy."""

    url: str
    prompts: tuple[str, ...]
    tokens: int


class Stream(msgspec.Struct, frozen=True, kw_only=True):
    """Times in seconds since all streams were asked for; `first` and `last` saw text arrive."""

    first: float
    last: float
    tokens: int
    prompt_tokens: int


class Result(msgspec.Struct, frozen=True):
    streams: tuple[Stream, ...]

    @property
    def ttft_s(self) -> float:
        return statistics.median(stream.first for stream in self.streams)

    @property
    def token_s(self) -> float:
        """From one token of a stream to the next; the median of the streams' means."""
        return statistics.median((s.last - s.first) / (s.tokens - 1) for s in self.streams)

    @property
    def tokens_per_s(self) -> float:
        """Of all streams together, from the requests to the last token."""
        return sum(s.tokens for s in self.streams) / max(s.last for s in self.streams)


def put(load: Load) -> Result:
    """Raises `BenchError` when an answer is refused, breaks off or has another length."""
    return trio.run(_put, load)


async def _put(load: Load) -> Result:
    address = urlsplit(load.url)
    assert address.hostname
    assert address.port
    connections = [await trio.open_tcp_stream(address.hostname, address.port) for _ in load.prompts]
    streams: list[Stream | None] = [None] * len(connections)
    failures: list[BenchError] = []
    began = trio.current_time()

    async def run(place: int) -> None:
        try:
            asked = _Stream(connections[place], address.netloc, began)
            streams[place] = await asked.run(load.prompts[place], load.tokens)
        except (BenchError, trio.BrokenResourceError, h11.ProtocolError) as error:
            failures.append(BenchError(f"{load.url}: {error}"))
            nursery.cancel_scope.cancel()

    with trio.move_on_after(TIMEOUT_S) as limit:
        async with trio.open_nursery() as nursery:
            for place in range(len(connections)):
                nursery.start_soon(run, place)
    for connection in connections:
        await trio.aclose_forcefully(connection)
    if limit.cancelled_caught:
        raise BenchError(f"{load.url}: no answer within {TIMEOUT_S:g} s")
    if failures:
        raise failures[0]
    return Result(tuple(stream for stream in streams if stream is not None))


class _Stream:
    """One request on a connection of its own."""

    def __init__(self, connection: trio.SocketStream, host: str, began: float) -> None:
        self._chat = ChatStream(connection, host)
        self._began = began
        self._first = self._last = 0.0
        self._usage: Usage | None = None

    async def run(self, prompt: str, tokens: int) -> Stream:
        body = {
            "messages": [{"role": "user", "content": prompt}],
            "max_tokens": tokens,
            "temperature": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
        await self._chat.run(body, self._add)
        if self._usage is None:
            raise BenchError("the answer broke off")
        if self._usage.completion_tokens != tokens:
            raise BenchError(f"{self._usage.completion_tokens} tokens came instead of {tokens}")
        return Stream(
            first=self._first,
            last=self._last,
            tokens=tokens,
            prompt_tokens=self._usage.prompt_tokens,
        )

    def _add(self, chunk: Chunk) -> None:
        if any(choice.delta.content for choice in chunk.choices):
            self._last = trio.current_time() - self._began
            self._first = self._first or self._last
        self._usage = chunk.usage or self._usage


def main(arguments: Sequence[str]) -> int:
    load = msgspec.json.decode(arguments[0], type=Load)
    try:
        print(msgspec.json.encode(put(load)).decode())
    except BenchError as error:
        print(error, file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
