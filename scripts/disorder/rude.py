"""Clients that no server would wish for: they leave at any moment, or hardly read."""

import random
import socket
import struct
from collections import Counter
from collections.abc import Sequence
from typing import Any, Literal

import msgspec
import trio

Moment = Literal["amid the request", "before an answer", "amid the answer"]
MOMENTS: tuple[Moment, ...] = ("amid the request", "before an answer", "amid the answer")

PATIENCE_S = 60.0
BEFORE_S = (0.0, 0.3)
AMID_BYTES = (1, 20_000)
RECEIVE_BYTES = 4096
SIP_S = 1.0
SMALL_BUFFER = 4096
DONE = b"data: [DONE]"
_RESET = struct.pack("ii", 1, 0)


def request_bytes(host: str, body: dict[str, Any]) -> bytes:
    content = msgspec.json.encode(body)
    head = f"POST /v1/chat/completions HTTP/1.1\r\nHost: {host}\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(content)}\r\n\r\n"
    return head.encode() + content


def long_answer(tokens: int, seed: int, user: str) -> dict[str, Any]:
    """A request for that many tokens exactly, with what makes each of them large."""
    return {
        "model": "demo",
        "messages": [{"role": "user", "content": "Tell me a story."}],
        "max_tokens": tokens,
        "min_tokens": tokens,
        "temperature": 1,
        "seed": seed,
        "stream": True,
        "logprobs": True,
        "top_logprobs": 20,
        "user": user,
    }


async def connect(place: str, buffer: int = 0) -> trio.SocketStream:
    """To HOST:PORT. At most `buffer` bytes wait on this side, 0 for as many as the system likes."""
    host, _, port = place.rpartition(":")
    if not buffer:
        return await trio.open_tcp_stream(host, int(port))
    connection = trio.socket.socket(socket.AF_INET, socket.SOCK_STREAM)
    # Only before the connection is made does it bound the window that is offered.
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    await connection.connect((host, int(port)))
    return trio.SocketStream(connection)


class Leavers:
    """Each asks one of `places` (HOST:PORT) for a long answer and is gone before its end, again and
    again until `over`."""

    def __init__(self, places: Sequence[str], tokens: int, seed: int) -> None:
        self.left: Counter[Moment] = Counter()
        self.over = trio.Event()
        self._places = places
        self._tokens = tokens
        self._seed = seed

    async def run(self, number: int) -> None:
        rng = random.Random(f"pxd leaver {self._seed} {number}")
        while not self.over.is_set():
            moment = rng.choice(MOMENTS)
            with trio.fail_after(PATIENCE_S):
                await self._leave(rng.choice(self._places), moment, rng)
            self.left[moment] += 1

    async def _leave(self, place: str, moment: Moment, rng: random.Random) -> None:
        body = long_answer(self._tokens, rng.getrandbits(31), "leaver")
        body["stream"] = moment == "amid the answer" or rng.random() < 0.5
        request = request_bytes(place, body)
        async with await connect(place) as connection:
            if moment == "amid the request":
                await connection.send_all(request[: rng.randrange(len(request))])
            else:
                await connection.send_all(request)
            if moment == "before an answer":
                await trio.sleep(rng.uniform(*BEFORE_S))
            elif moment == "amid the answer":
                await _read(connection, rng.randint(*AMID_BYTES))
            if rng.random() < 0.5:
                connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, _RESET)


async def _read(connection: trio.SocketStream, least: int) -> None:
    got = 0
    while got < least:
        data = await connection.receive_some(RECEIVE_BYTES)
        if not data:
            return
        got += len(data)


class Sippers:
    """Each asks for a long answer and takes a byte a second of it, until it is `over`.

    Then it takes the rest; `dropped` counts those that the server would not wait for any more.
    """

    def __init__(self, places: Sequence[str], tokens: int, buffer: int = SMALL_BUFFER) -> None:
        self.dropped = 0
        self.over = trio.Event()
        self._places = places
        self._tokens = tokens
        self._buffer = buffer

    async def run(self, number: int) -> None:
        place = self._places[number % len(self._places)]
        async with await connect(place, self._buffer) as connection:
            body = long_answer(self._tokens, number, "sipper")
            await connection.send_all(request_bytes(place, body))
            while not self.over.is_set():
                with trio.move_on_after(SIP_S):
                    await connection.receive_some(1)
                with trio.move_on_after(SIP_S):
                    await self.over.wait()
            self.dropped += not await _ends(connection)


async def _ends(connection: trio.SocketStream) -> bool:
    """Take what is there; whether that is a whole answer."""
    end = b""
    with trio.move_on_after(PATIENCE_S):
        while DONE not in end:
            try:
                data = await connection.receive_some(RECEIVE_BYTES)
            except trio.BrokenResourceError:
                return False
            if not data:
                return False
            end = end[-len(DONE) :] + data
        return True
    return False
