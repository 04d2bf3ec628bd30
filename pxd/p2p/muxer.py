"""Yamux: many streams over one connection, with flow control and a keepalive that has a deadline.

Follows https://github.com/hashicorp/yamux/blob/master/spec.md, so any libp2p node can speak it as
``/yamux/1.0.0``. Written anew because libp2p 0.8.1's own lets a peer exceed its window, dies with
a cancelled write, deadlocks under bulk in both directions and does not notice a silent peer.
"""

import logging
import struct
from collections import deque
from collections.abc import Awaitable, Callable
from typing import Protocol

import trio

log = logging.getLogger("pxd.p2p")

DATA, WINDOW_UPDATE, PING, GO_AWAY = range(4)
SYN, ACK, FIN, RST = 1, 2, 4, 8
_HEADER = struct.Struct(">BBHII")

INITIAL_WINDOW = 256 * 1024
WINDOW = 1 << 20
QUANTUM = 32 * 1024
COALESCE = 4 * 1024
"""What arrives in smaller pieces is put together: an object for each would dwarf its content."""

CONTROL_LIMIT = 4096

PING_INTERVAL = 2.0
MISSED_PINGS = 4
"""A connection on which nothing arrived for so many ping intervals is dead."""


class StreamClosed(Exception):
    """The stream or the connection below it ended before the operation could complete."""


class ProtocolViolation(Exception):
    """The peer does not follow the Yamux specification."""


class SecuredConnection(Protocol):
    """What Yamux runs on. `abort` must make a blocked `read` or `write` raise at once."""

    async def read(self) -> bytes:
        """At least one byte; raises at the end."""

    async def write(self, data: bytes) -> None: ...

    def abort(self) -> None: ...


class YamuxStream:
    """One stream. One task may read and one may write at a time.

    A cancelled read loses nothing. A cancelled write sends all of its data or nothing, or it
    resets the stream; other streams are not touched. What arrived before an end can still be read.
    `window` is how many bytes it takes in ahead of its reader, if that is less than the muxer's.
    """

    def __init__(self, muxer: "Yamux", stream_id: int) -> None:
        self.id = stream_id
        self.window = WINDOW
        self._muxer = muxer
        self._received: deque[bytes | bytearray] = deque()
        self._buffered = 0
        self._receive_window = INITIAL_WINDOW
        self._received_bytes = 0
        self._receive_ended = False
        self._arrived = trio.Event()
        self._send_window = INITIAL_WINDOW
        self._send_ended = False
        self._outgoing = memoryview(b"")
        self._sent = trio.Event()
        self._reset = False

    async def read_some(self, limit: int) -> bytes:
        """At most `limit` bytes; b"" at the end. Raises `StreamClosed` after a reset."""
        while not self._buffered:
            if self._reset:
                raise StreamClosed("the stream was reset")
            if self._receive_ended:
                return b""
            self._arrived = trio.Event()
            await self._arrived.wait()
        chunk = self._received.popleft()
        if len(chunk) > limit:
            self._received.appendleft(chunk[limit:])
            chunk = chunk[:limit]
        self._buffered -= len(chunk)
        self._return_credit()
        return bytes(chunk)

    async def read_exactly(self, count: int) -> bytearray:
        """Raises `StreamClosed` when the stream ends before `count` bytes."""
        data = bytearray()
        while len(data) < count:
            chunk = await self.read_some(count - len(data))
            if not chunk:
                raise StreamClosed(f"the stream ended after {len(data)} of {count} bytes")
            data += chunk
        return data

    async def write(self, data: bytes | bytearray | memoryview) -> None:
        """Return when all of `data` is handed to the socket. Raises `StreamClosed`."""
        if len(self._outgoing):
            raise trio.BusyResourceError("another task writes to this stream")
        if self._send_ended or self._reset:
            raise StreamClosed("the stream is closed for writing")
        view = memoryview(data).cast("B")
        if not len(view):
            return
        self._outgoing, self._sent = view, trio.Event()
        self._muxer.wake(self)
        try:
            await self._sent.wait()
        except trio.Cancelled:
            if 0 < len(self._outgoing) < len(view):
                self.reset()
            self._outgoing = memoryview(b"")
            raise
        if self._reset:
            raise StreamClosed("the stream was reset")

    def finish(self) -> None:
        """Say that nothing more will be written; call it between writes only."""
        if not self._send_ended and not self._reset:
            self._send_ended = True
            self._muxer.control(WINDOW_UPDATE, FIN, self.id)
            self._forget_if_done()

    def reset(self) -> None:
        """End both directions at once; the peer sees a reset. Does nothing on an ended stream."""
        if not self._reset and not (self._send_ended and self._receive_ended):
            self._muxer.control(WINDOW_UPDATE, RST, self.id)
            self.abandon()

    # What follows is for the muxer only.

    def next_chunk(self) -> memoryview:
        """Take what may be sent now, at most `QUANTUM` bytes."""
        size = min(len(self._outgoing), self._send_window, QUANTUM)
        chunk = self._outgoing[:size]
        self._outgoing = self._outgoing[size:]
        self._send_window -= size
        return chunk

    @property
    def can_send(self) -> bool:
        return len(self._outgoing) > 0 and self._send_window > 0

    def written(self) -> None:
        if not len(self._outgoing):
            self._sent.set()

    def grant(self, credit: int) -> None:
        self._send_window += credit
        if self._send_window > 1 << 32:
            raise ProtocolViolation("a send window beyond 4 GiB")
        self._muxer.wake(self)

    def announce(self, size: int) -> None:
        """The peer is about to send `size` bytes; raises if that is more than it may."""
        if self._receive_ended or size > self._receive_window:
            raise ProtocolViolation(f"{size} bytes where {self._receive_window} were granted")
        self._receive_window -= size
        self._received_bytes += size

    def deliver(self, data: bytes) -> None:
        if len(data) >= COALESCE:
            self._received.append(data)
        elif self._received and len(self._received[-1]) < COALESCE:
            # At most `COALESCE` bytes are copied, should the last piece be a cut one.
            self._received[-1] += data
        else:
            self._received.append(bytearray(data))
        self._buffered += len(data)
        self._arrived.set()

    def end_receiving(self) -> None:
        self._receive_ended = True
        self._arrived.set()
        self._forget_if_done()

    def abandon(self) -> None:
        self._reset = True
        self._outgoing = memoryview(b"")
        self._arrived.set()
        self._sent.set()
        self._muxer.forget(self)

    def _return_credit(self) -> None:
        window = min(self.window, self._muxer.window)
        credit = window - self._receive_window - self._buffered
        # A wider window than the first is for those who use it, and `window` can be lowered before.
        if self._received_bytes < INITIAL_WINDOW // 2:
            return
        if credit >= window // 2 and not self._receive_ended and not self._reset:
            self._receive_window += credit
            self._muxer.control(WINDOW_UPDATE, 0, self.id, credit)

    def _forget_if_done(self) -> None:
        if self._send_ended and self._receive_ended:
            self._muxer.forget(self)


class Yamux:
    """The streams of one secured connection; works while `run` runs.

    `orderly` says that one of the two ends meant it to end, `doubted` that `check` is waiting.
    """

    def __init__(self, secured: SecuredConnection, *, initiator: bool) -> None:
        self.closed = trio.Event()
        self.reason = ""
        self.orderly = False
        self.doubted = False
        self.window = INITIAL_WINDOW
        self.inbound_limit = 4
        self.receive_limit: int | None = None
        """How many bytes the peer may still send; None for as many as it likes."""
        self._secured = secured
        self._next_id = 1 if initiator else 2
        self._peer_parity = 0 if initiator else 1
        self._streams: dict[int, YamuxStream] = {}
        self._inbound = 0
        self._served = 0
        self._control: deque[bytes] = deque()
        self._ready: deque[YamuxStream] = deque()
        self._work = trio.Event()
        self._flushed = trio.Event()
        self._heard = False
        self._news = trio.Event()
        self._buffer = bytearray()
        self._frame: tuple[YamuxStream | None, int, int] | None = None
        self._on_stream: Callable[[YamuxStream], None] = YamuxStream.reset

    async def run(self, on_stream: Callable[[YamuxStream], Awaitable[None]]) -> None:
        """Serve until the connection ends, then return; `reason` tells why it did.

        Each inbound stream is handed to `on_stream` in a task of its own, cancelled at the end.
        At most `inbound_limit` of them run at once, even if the peer resets their streams.
        """

        async def serve(stream: YamuxStream) -> None:
            try:
                await on_stream(stream)
            finally:
                self._served -= 1

        def start(stream: YamuxStream) -> None:
            self._served += 1
            nursery.start_soon(serve, stream)

        async with trio.open_nursery() as nursery:
            self._on_stream = start
            nursery.start_soon(self._write_loop)
            nursery.start_soon(self._ping_loop)
            nursery.start_soon(self._read_loop)
            try:
                await self.closed.wait()
            finally:
                self.abort("closed by this node")
                nursery.cancel_scope.cancel()

    @property
    def open_streams(self) -> tuple[YamuxStream, ...]:
        """Of both sides."""
        return tuple(self._streams.values())

    def open_stream(self) -> YamuxStream:
        """Raises `StreamClosed` when the connection has ended."""
        if self.closed.is_set():
            raise StreamClosed(self.reason)
        stream = YamuxStream(self, self._next_id)
        self._next_id += 2
        self._streams[stream.id] = stream
        self.control(WINDOW_UPDATE, SYN, stream.id)
        return stream

    def abort(self, reason: str) -> None:
        """End the connection now, whatever is blocked on it."""
        if self.closed.is_set():
            return
        self.reason = reason
        self.doubted = False
        self.closed.set()
        self._secured.abort()
        for stream in tuple(self._streams.values()):
            stream.abandon()

    async def close(self, reason: str, *, grace: float = 0.5) -> None:
        """Tell the peer, wait up to `grace` seconds until that is sent, then `abort`."""
        if not self.closed.is_set():
            self.orderly = True
            self._flushed = trio.Event()
            self.control(GO_AWAY, 0, 0)
            with trio.move_on_after(grace):
                await self._flushed.wait()
        self.abort(reason)

    async def check(self, within: float) -> None:
        """Ping, and `abort` unless something is heard within `within` seconds.

        Until then the connection is `doubted`: better use another one where there is one.
        """
        if self.doubted or self.closed.is_set():
            return
        self.doubted = True
        news = self._news = trio.Event()
        self.control(PING, SYN, 0, 0)
        with trio.move_on_after(within):
            await news.wait()
        self.doubted = False
        if not news.is_set():
            self.abort(f"the peer does not answer any more ({within:g} s)")

    def wake(self, stream: YamuxStream) -> None:
        if stream.can_send and stream not in self._ready:
            self._ready.append(stream)
            self._work.set()

    def control(self, kind: int, flags: int, stream_id: int, value: int = 0) -> None:
        if len(self._control) >= CONTROL_LIMIT:
            self.abort("the peer makes more work than it reads answers")
            return
        self._control.append(_HEADER.pack(0, kind, flags, stream_id, value))
        self._work.set()

    def forget(self, stream: YamuxStream) -> None:
        if self._streams.pop(stream.id, None) and stream.id % 2 == self._peer_parity:
            self._inbound -= 1

    async def _write_loop(self) -> None:
        try:
            while True:
                while not self._control and not self._ready:
                    self._work = trio.Event()
                    await self._work.wait()
                data, streams = self._next_batch()
                await self._secured.write(data)
                for stream in streams:
                    stream.written()
                if not self._control:
                    self._flushed.set()
        except Exception:
            log.debug("writing failed", exc_info=True)
            self.abort("the connection broke")

    def _next_batch(self) -> tuple[bytes, list[YamuxStream]]:
        parts: list[bytes | memoryview] = list(self._control)
        self._control.clear()
        streams: list[YamuxStream] = []
        size = 0
        while self._ready and size < QUANTUM:
            stream = self._ready.popleft()
            chunk = stream.next_chunk()
            if not len(chunk):
                continue
            parts += (_HEADER.pack(0, DATA, 0, stream.id, len(chunk)), chunk)
            size += len(chunk)
            streams.append(stream)
            if stream.can_send:
                self._ready.append(stream)
        return b"".join(parts), streams

    async def _ping_loop(self) -> None:
        # Intervals are counted, not seconds, so that a pause of this whole process, in which
        # nothing could be read, is not taken for silence of the peer.
        missed = 0
        number = 0
        while missed < MISSED_PINGS:
            self._heard = False
            number = (number + 1) % (1 << 32)
            self.control(PING, SYN, 0, number)
            await trio.sleep(PING_INTERVAL)
            missed = 0 if self._heard else missed + 1
        self.abort(f"the peer has been silent for {PING_INTERVAL * MISSED_PINGS:g} s")

    async def _read_loop(self) -> None:
        try:
            while True:
                data = await self._secured.read()
                if self.receive_limit is not None:
                    self.receive_limit -= len(data)
                    if self.receive_limit < 0:
                        raise ProtocolViolation("more than it may send yet")
                self._buffer += data
                self._heard = True
                self._news.set()
                self._parse()
        except ProtocolViolation as error:
            self.abort(f"the peer broke the muxer's protocol: {error}")
        except Exception:
            log.debug("reading failed", exc_info=True)
            self.abort("the connection broke")

    def _parse(self) -> None:
        """Handle every whole frame, and as much of a data frame's body as is there."""
        buffer = self._buffer
        offset = 0
        while True:
            if self._frame:
                stream, flags, left = self._frame
                piece = bytes(buffer[offset : offset + left])
                offset += len(piece)
                if piece and stream and stream.id in self._streams:
                    stream.deliver(piece)
                if len(piece) < left:
                    self._frame = stream, flags, left - len(piece)
                    break
                self._frame = None
                if stream:
                    self._apply_end(stream, flags)
            elif len(buffer) - offset >= _HEADER.size:
                self._on_header(*_HEADER.unpack_from(buffer, offset))
                offset += _HEADER.size
            else:
                break
        del buffer[:offset]

    def _on_header(self, version: int, kind: int, flags: int, stream_id: int, value: int) -> None:
        if version != 0 or kind > GO_AWAY:
            raise ProtocolViolation(f"version {version}, frame type {kind}")
        if kind == PING:
            if flags & SYN:
                self.control(PING, ACK, 0, value)
        elif kind == GO_AWAY:
            self.orderly = True
            self.abort("the peer closed the connection")
        else:
            stream = self._accept(stream_id) if flags & SYN else self._streams.get(stream_id)
            if kind == DATA:
                if stream:
                    stream.announce(value)
                elif value > WINDOW:
                    raise ProtocolViolation(f"{value} bytes for a stream that is closed")
                self._frame = stream, flags, value
            elif stream:
                stream.grant(value)
                self._apply_end(stream, flags)

    def _accept(self, stream_id: int) -> YamuxStream | None:
        if stream_id % 2 != self._peer_parity or stream_id == 0 or stream_id in self._streams:
            raise ProtocolViolation(f"the peer opened stream {stream_id}")
        if max(self._inbound, self._served) >= self.inbound_limit:
            self.control(WINDOW_UPDATE, RST, stream_id)
            return None
        self._inbound += 1
        stream = self._streams[stream_id] = YamuxStream(self, stream_id)
        self.control(WINDOW_UPDATE, ACK, stream_id)
        self._on_stream(stream)
        return stream

    def _apply_end(self, stream: YamuxStream, flags: int) -> None:
        if flags & RST:
            stream.abandon()
        elif flags & FIN:
            stream.end_receiving()
