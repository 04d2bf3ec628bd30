"""How long one connection waits for its client, in virtual time."""

import pytest
import trio
from hypercorn.app_wrappers import ASGIWrapper
from hypercorn.config import Config
from hypercorn.events import Closed, Event, RawData
from hypercorn.trio.worker_context import WorkerContext
from trio.testing import MockClock

from pxd.api.connection import PIECE_BYTES, SEND_TIMEOUT_S, Connection


class _Client:
    """The server's stream to a client that takes as many bytes a second, and no more than `most`
    in all."""

    def __init__(self, speed: float, most: float = float("inf")) -> None:
        self.taken = b""
        self._speed = speed
        self._most = most

    async def send_all(self, data: bytes) -> None:
        if len(self.taken) + len(data) > self._most:
            await trio.sleep_forever()
        await trio.sleep(len(data) / self._speed)
        self.taken += bytes(data)

    async def aclose(self) -> None:
        await trio.lowlevel.checkpoint()


class _Protocol:
    def __init__(self) -> None:
        self.heard: list[Event] = []

    async def handle(self, event: Event) -> None:
        self.heard.append(event)


async def sent(client: _Client, data: bytes) -> list[Event]:
    """What the connection's protocol heard of it."""
    app = ASGIWrapper(lambda *_: None)  # type: ignore[arg-type]
    connection = Connection(app, Config(), WorkerContext(None), client)  # type: ignore[arg-type]
    protocol = connection.protocol = _Protocol()  # type: ignore[assignment]
    await connection.protocol_send(RawData(data))
    return protocol.heard


async def test_a_large_answer_may_take_its_time(autojump_clock: MockClock) -> None:
    answer = bytes(range(256)) * (10 * PIECE_BYTES // 256)
    client = _Client(speed=PIECE_BYTES / (SEND_TIMEOUT_S - 1))
    assert await sent(client, answer) == []
    assert client.taken == answer
    assert trio.current_time() > 5 * SEND_TIMEOUT_S


@pytest.mark.parametrize("most", [0, 3 * PIECE_BYTES])
async def test_who_takes_nothing_more_is_dropped(most: int, autojump_clock: MockClock) -> None:
    [end] = await sent(_Client(speed=1e9, most=most), bytes(10 * PIECE_BYTES))
    assert isinstance(end, Closed)
