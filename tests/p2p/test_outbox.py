"""A data channel takes a better way without losing a frame, and ends with a broken connection."""

from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pxd.p2p.network import PeerUnreachable
from pxd.p2p.outbox import QUIET, FrameOutbox


class FakeSession:
    """A session whose connection is at `host`."""

    def __init__(self, host: str) -> None:
        self.peer = "peer"
        self.ended = trio.Event()
        self.shaken = trio.Event()
        self.host = host

    @property
    def connection(self) -> Any:
        return self


class FakeStream:
    def __init__(self, host: str) -> None:
        self.host = host
        self.written: list[bytes] = []
        self.closed = False

    async def write(self, *parts: bytes) -> None:
        await trio.sleep(0.1)
        assert not self.closed
        self.written.append(b"".join(parts))

    async def read_exactly(self, count: int) -> bytes:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        self.closed = True


class Outbox:
    def __init__(self, nursery: trio.Nursery) -> None:
        self.session: Any = FakeSession("wifi")
        self.streams: list[FakeStream] = []
        self._nursery = nursery
        self._outbox = FrameOutbox(self._open)

    async def _open(self, session: Any) -> FakeStream:
        await trio.lowlevel.checkpoint()
        self.streams.append(FakeStream(session.host))
        return self.streams[-1]

    async def send(self, text: bytes) -> None:
        await self._outbox.send(self._nursery, self.session, text, b"")

    @property
    def written(self) -> list[tuple[str, list[bytes]]]:
        return [(stream.host, stream.written) for stream in self.streams]


@pytest.fixture
async def outbox(nursery: trio.Nursery) -> Outbox:
    return Outbox(nursery)


async def test_a_channel_at_rest_takes_the_better_way(
    outbox: Outbox, autojump_clock: MockClock
) -> None:
    await outbox.send(b"1")
    outbox.session.host = "cable"
    for number in range(20):
        await outbox.send(b"busy %d" % number)
        await trio.sleep(QUIET / 3)
    assert [stream.host for stream in outbox.streams] == ["wifi"]
    await trio.sleep(2 * QUIET)
    assert outbox.streams[0].closed
    await outbox.send(b"2")
    await outbox.send(b"3")
    await trio.sleep(2 * QUIET)
    assert outbox.written[1] == ("cable", [b"2", b"3"])
    assert not outbox.streams[1].closed


async def test_senders_that_wait_while_it_changes_over_lose_nothing(
    outbox: Outbox, autojump_clock: MockClock
) -> None:
    await outbox.send(b"first")
    outbox.session.host = "cable"
    # At the very moment at which the channel has been quiet for long enough.
    await trio.sleep(QUIET + 0.1)
    async with trio.open_nursery() as nursery:
        for number in range(5):
            nursery.start_soon(outbox.send, b"%d" % number)
    await trio.sleep(1)
    sent = [frame for _, frames in outbox.written for frame in frames]
    assert sorted(sent) == [b"0", b"1", b"2", b"3", b"4", b"first"]


async def test_a_broken_connection_takes_the_channel_with_it_and_says_so_once(
    outbox: Outbox, autojump_clock: MockClock
) -> None:
    await outbox.send(b"1")
    await trio.sleep(1)
    outbox.session.shaken.set()
    outbox.session.shaken = trio.Event()
    await trio.sleep(1)
    assert outbox.streams[0].closed
    with pytest.raises(PeerUnreachable, match="a connection broke"):
        await outbox.send(b"lost")
    await outbox.send(b"2")
    await trio.sleep(1)
    assert outbox.written[1] == ("wifi", [b"2"])
