"""A data channel takes a better way without losing a frame, and ends with a broken connection."""

from collections.abc import Awaitable, Callable
from typing import Any

import pytest
import trio
import trio.testing
from trio.testing import MockClock

from pxd import wire
from pxd.p2p.network import PeerUnreachable
from pxd.p2p.outbox import QUIET, FrameOutbox
from pxd.p2p.tls import TlsStream


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
        self.opened = 0
        self._nursery = nursery
        self._outbox = FrameOutbox(self._open)
        self._make: Callable[[Any], Awaitable[Any]] = self._fake

    def use(self, make: Callable[[Any], Awaitable[Any]]) -> None:
        """Have channels run on what `make` returns."""
        self._make = make

    async def _open(self, session: Any) -> Any:
        self.opened += 1
        return await self._make(session)

    async def _fake(self, session: Any) -> FakeStream:
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


class DirectStream(TlsStream):
    """Takes at once what `room` is left for, and the rest when it is written."""

    def __init__(self) -> None:
        self.sent = b""
        self.room = 1 << 20
        self.can_write = trio.Event()
        self._unsent = b""

    def write_now(self, *parts: wire.Buffer) -> bool:
        if self._unsent:
            return False
        data = b"".join(parts)
        self.sent += data[: self.room]
        self._unsent = data[self.room :]
        return True

    async def write(self, *parts: wire.Buffer) -> None:
        await self.can_write.wait()
        self.sent += b"".join((self._unsent, *parts))
        self._unsent = b""

    async def read_exactly(self, count: int) -> bytearray:
        await trio.sleep_forever()
        raise AssertionError

    def close(self) -> None:
        pass


@pytest.fixture
async def direct(nursery: trio.Nursery) -> tuple[Outbox, DirectStream]:
    outbox, stream = Outbox(nursery), DirectStream()

    async def opened(session: Any) -> DirectStream:
        await trio.lowlevel.checkpoint()
        return stream

    outbox.use(opened)
    stream.can_write.set()
    await outbox.send(b"open")
    await trio.testing.wait_all_tasks_blocked()
    stream.sent, stream.can_write = b"", trio.Event()
    return outbox, stream


async def test_a_small_frame_leaves_before_its_sender_goes_on(
    direct: tuple[Outbox, DirectStream],
) -> None:
    outbox, stream = direct
    await outbox.send(b"1")
    assert stream.sent == b"1"


async def test_what_the_socket_does_not_take_is_sent_before_what_follows(
    direct: tuple[Outbox, DirectStream], nursery: trio.Nursery
) -> None:
    outbox, stream = direct
    stream.room = 1
    await outbox.send(b"abc")
    nursery.start_soon(outbox.send, b"def")
    await trio.testing.wait_all_tasks_blocked()
    assert stream.sent == b"a"
    stream.can_write.set()
    await trio.testing.wait_all_tasks_blocked()
    assert stream.sent == b"abcdef"


async def test_a_frame_that_waits_is_not_overtaken(
    direct: tuple[Outbox, DirectStream], nursery: trio.Nursery
) -> None:
    outbox, stream = direct
    stream.can_write.set()
    for number in range(50):
        stream.room = number % 3
        await outbox.send(b"%02d" % number)
    await trio.testing.wait_all_tasks_blocked()
    assert stream.sent == b"".join(b"%02d" % number for number in range(50))


async def test_a_sender_that_is_cancelled_has_sent_the_frame_that_was_begun(
    direct: tuple[Outbox, DirectStream],
) -> None:
    outbox, stream = direct
    stream.room = 1
    await outbox.send(b"abc")
    with trio.CancelScope() as scope:
        scope.cancel()
        await outbox.send(b"def")
    stream.can_write.set()
    await outbox.send(b"ghi")
    await trio.testing.wait_all_tasks_blocked()
    assert stream.sent == b"abcghi"


async def test_frames_that_leave_at_once_keep_a_channel_from_changing_over(
    direct: tuple[Outbox, DirectStream], autojump_clock: MockClock
) -> None:
    outbox, _ = direct
    outbox.session.host = "cable"
    opened = outbox.opened
    for _ in range(20):
        await outbox.send(b".")
        await trio.sleep(QUIET / 3)
    assert outbox.opened == opened
    await trio.sleep(2 * QUIET)
    assert outbox.opened == opened + 1
