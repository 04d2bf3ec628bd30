"""Yamux between two ends in memory, and against a peer that breaks its rules."""

import contextlib
import struct
import tracemalloc

import pytest
import trio
from hypothesis import given, settings
from hypothesis import strategies as st
from trio.testing import MockClock

from pxd.p2p import muxer
from pxd.p2p.muxer import INITIAL_WINDOW, StreamClosed, Yamux, YamuxStream


class Pipe:
    """A `SecuredConnection` in memory; `blocked` makes writes wait until it is aborted."""

    def __init__(self) -> None:
        self._send, self._receive = trio.open_memory_channel[bytes](0)
        self._aborted = trio.Event()
        self.other: Pipe
        self.blocked = False
        self.sent = bytearray()

    async def read(self) -> bytes:
        return await self._receive.receive()

    async def write(self, data: bytes) -> None:
        if self.blocked:
            await self._aborted.wait()
            raise trio.ClosedResourceError
        self.sent += data
        await self.other._send.send(data)

    def abort(self) -> None:
        self._aborted.set()
        self._receive.close()
        self.other._send.close()


def pair() -> tuple[Yamux, Yamux, Pipe, Pipe]:
    here, there = Pipe(), Pipe()
    here.other, there.other = there, here
    return Yamux(here, initiator=True), Yamux(there, initiator=False), here, there


async def refuse(stream: YamuxStream) -> None:
    stream.reset()


class Ends:
    """Two connected muxers; streams opened by `a` arrive in `accepted`."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.a, self.b, self.pipe_a, self.pipe_b = pair()
        send, self.accepted = trio.open_memory_channel[YamuxStream](100)

        async def accept(stream: YamuxStream) -> None:
            await send.send(stream)

        nursery.start_soon(self.a.run, refuse)
        nursery.start_soon(self.b.run, accept)

    async def stream(self) -> tuple[YamuxStream, YamuxStream]:
        stream = self.a.open_stream()
        with trio.fail_after(5):
            return stream, await self.accepted.receive()


@pytest.fixture
async def ends(nursery: trio.Nursery) -> Ends:
    return Ends(nursery)


async def test_bytes_arrive_in_order_and_the_end_is_seen(ends: Ends) -> None:
    here, there = await ends.stream()
    await here.write(b"hello ")
    await here.write(b"world")
    here.finish()
    assert await there.read_exactly(11) == b"hello world"
    assert await there.read_some(1) == b""
    with pytest.raises(StreamClosed):
        await there.read_exactly(1)
    with pytest.raises(StreamClosed):
        await here.write(b"more")


@given(st.lists(st.integers(0, 700_000), min_size=1, max_size=4), st.integers(1, 300_000))
@settings(max_examples=15, deadline=None)
def test_any_amount_in_both_directions_at_once(sizes: list[int], step: int) -> None:
    async def main() -> None:
        async with trio.open_nursery() as nursery:
            ends = Ends(nursery)
            async with trio.open_nursery() as transfers:
                for size in sizes:
                    one, other = await ends.stream()
                    data = bytes(i * 31 % 251 for i in range(97)) * (size // 97 + 1)
                    for source, sink in ((one, other), (other, one)):
                        transfers.start_soon(source.write, data)
                        transfers.start_soon(check, sink, data, step)
            nursery.cancel_scope.cancel()

    async def check(sink: YamuxStream, data: bytes, step: int) -> None:
        got = bytearray()
        while len(got) < len(data):
            got += await sink.read_some(step)
        assert got == data

    trio.run(main)


async def test_a_stream_that_nobody_reads_holds_back_its_writer_only(
    ends: Ends, nursery: trio.Nursery
) -> None:
    stuck, _ = await ends.stream()
    nursery.start_soon(stuck.write, bytes(4 << 20))
    await trio.testing.wait_all_tasks_blocked()
    assert len(ends.pipe_a.sent) < 2 * muxer.INITIAL_WINDOW
    free, other = await ends.stream()
    await free.write(b"x" * 100_000)
    assert len(await other.read_exactly(100_000)) == 100_000


async def test_many_tiny_frames_take_no_more_room_than_a_large_one(ends: Ends) -> None:
    _, there = await ends.stream()
    tracemalloc.start()
    try:
        for _ in range(INITIAL_WINDOW):
            there.announce(1)
            there.deliver(b"x")
        held, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert held < 2 * INITIAL_WINDOW
    assert await there.read_exactly(INITIAL_WINDOW) == b"x" * INITIAL_WINDOW


async def test_a_cancelled_write_leaves_other_streams_alone(ends: Ends) -> None:
    stuck, its_end = await ends.stream()
    free, other = await ends.stream()
    async with trio.open_nursery() as nursery:
        nursery.start_soon(stuck.write, bytes(4 << 20))
        await trio.testing.wait_all_tasks_blocked()
        nursery.cancel_scope.cancel()
    await free.write(b"fine")
    assert await other.read_exactly(4) == b"fine"
    with pytest.raises(StreamClosed):
        await its_end.read_exactly(4 << 20)


async def test_what_arrived_before_the_connection_ended_can_be_read(ends: Ends) -> None:
    here, there = await ends.stream()
    await here.write(b"last words")
    await ends.a.close("done")
    await ends.b.closed.wait()
    assert await there.read_exactly(10) == b"last words"
    with pytest.raises(StreamClosed):
        await there.read_some(1)
    assert ends.b.reason == "the peer closed the connection"
    with pytest.raises(StreamClosed):
        ends.b.open_stream()


async def test_more_streams_than_allowed_are_refused(ends: Ends) -> None:
    for _ in range(ends.b.inbound_limit):
        await ends.stream()
    with pytest.raises(StreamClosed):
        await ends.a.open_stream().read_some(1)
    assert not ends.b.closed.is_set()


def frame(
    kind: int, flags: int, stream: int, length: int, body: bytes = b"", version: int = 0
) -> bytes:
    return struct.pack(">BBHII", version, kind, flags, stream, length) + body


OPEN = frame(muxer.WINDOW_UPDATE, muxer.SYN, 1, 0)


@pytest.mark.parametrize(
    "attack",
    [
        frame(muxer.DATA, 0, 9, 1, version=1),
        frame(7, 0, 1, 0),
        frame(muxer.WINDOW_UPDATE, muxer.SYN, 2, 0),
        frame(muxer.WINDOW_UPDATE, muxer.SYN, 0, 0),
        OPEN + OPEN,
        frame(muxer.DATA, 0, 9, (1 << 32) - 1),
        OPEN + frame(muxer.DATA, 0, 1, muxer.INITIAL_WINDOW + 1),
        OPEN + 2 * frame(muxer.DATA, 0, 1, muxer.INITIAL_WINDOW, bytes(muxer.INITIAL_WINDOW)),
        OPEN + 2 * frame(muxer.WINDOW_UPDATE, 0, 1, (1 << 32) - 1),
        OPEN + frame(muxer.WINDOW_UPDATE, muxer.FIN, 1, 0) + frame(muxer.DATA, 0, 1, 1, b"x"),
    ],
    ids=[
        "unknown version",
        "unknown frame type",
        "a stream id of the wrong side",
        "stream id 0",
        "a stream opened twice",
        "4 GiB for an unknown stream",
        "a frame beyond the window",
        "frames beyond the window",
        "a window beyond all bounds",
        "data after the end",
    ],
)
async def test_a_peer_that_breaks_the_rules_is_cut_off(attack: bytes) -> None:
    _, victim, near, _ = pair()

    async def keep(stream: YamuxStream) -> None:
        await trio.sleep_forever()

    with trio.fail_after(5):
        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim.run, keep)
            nursery.start_soon(drain, near)
            await near.write(attack)
            await victim.closed.wait()
    assert "protocol" in victim.reason


async def drain(pipe: Pipe) -> None:
    with contextlib.suppress(trio.EndOfChannel):
        while True:
            await pipe.read()


async def flood(pipe: Pipe, data: bytes, times: int) -> None:
    for _ in range(times):
        await pipe.write(data)


@given(st.binary(max_size=400), st.integers(1, 50))
@settings(max_examples=60, deadline=None)
def test_random_bytes_end_the_connection_at_worst(data: bytes, step: int) -> None:
    async def main() -> None:
        _, victim, near, _ = pair()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(victim.run, refuse)
            nursery.start_soon(drain, near)
            for start in range(0, len(data), step):
                with contextlib.suppress(trio.BrokenResourceError):
                    await near.write(data[start : start + step])
            victim.abort("the test is over")

    trio.run(main)


async def test_a_silent_peer_is_noticed_and_what_waits_for_it_fails(
    ends: Ends, autojump_clock: MockClock
) -> None:
    stream, _ = await ends.stream()
    await trio.sleep(60)
    assert not ends.a.closed.is_set()
    started = trio.current_time()
    ends.pipe_a.blocked = ends.pipe_b.blocked = True
    with pytest.raises(StreamClosed):
        await stream.write(b"hello?")
    assert "silent" in ends.a.reason
    assert trio.current_time() - started <= muxer.PING_INTERVAL * (muxer.MISSED_PINGS + 1)


async def test_a_check_ends_a_connection_that_is_dead_and_no_other(
    ends: Ends, autojump_clock: MockClock
) -> None:
    await ends.a.check(1.5)
    assert not ends.a.closed.is_set()
    assert not ends.a.doubted
    # Anything heard counts, also an answer that is still under way to what was asked before.
    await trio.testing.wait_all_tasks_blocked()
    ends.pipe_a.blocked = ends.pipe_b.blocked = True
    async with trio.open_nursery() as nursery:
        nursery.start_soon(ends.a.check, 1.5)
        await trio.sleep(1)
        assert ends.a.doubted
        await ends.a.closed.wait()
    assert "does not answer" in ends.a.reason
    assert not ends.a.orderly


async def test_both_ends_know_that_an_end_was_meant(ends: Ends) -> None:
    await ends.stream()
    await ends.a.close("enough")
    await ends.b.closed.wait()
    assert ends.a.orderly
    assert ends.b.orderly


async def test_a_peer_that_asks_without_reading_is_cut_off(nursery: trio.Nursery) -> None:
    _, victim, near, its_pipe = pair()
    its_pipe.blocked = True
    nursery.start_soon(victim.run, refuse)
    pings = frame(muxer.PING, muxer.SYN, 0, 1) * 1000
    with trio.fail_after(5), pytest.raises(trio.BrokenResourceError):
        await flood(near, pings, 10)
    assert victim.closed.is_set()
