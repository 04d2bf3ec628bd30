"""Typed calls over one long-lived stream per direction, many at a time, each with a deadline.

The dialer of the stream sends requests and casts, the other side answers them by id, in any order.
A message is a big-endian 32-bit length and a msgpack struct; the length is checked before anything
is allocated.
"""

import itertools
import logging
import struct
from collections.abc import Awaitable, Callable
from typing import Annotated, TypeVar

import msgspec
import trio

from pxd.p2p.casts import DroppingQueue
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.network import CallFailed, CallTimeout, PeerUnreachable
from pxd.p2p.services import MESSAGE_LIMIT, Services
from pxd.wire import DECODE_ERRORS, Count, Identifier, Reason

log = logging.getLogger("pxd.p2p")

PROTOCOL = "/pxd/rpc/1"
CALLS_IN_FLIGHT = 64
CALLS_SERVED = 2 * CALLS_IN_FLIGHT
BYTES_SERVED = 4 * MESSAGE_LIMIT
"""The most that the requests of one peer that run may hold."""

LONGEST_CALL = 3600.0
CAST_TIMEOUT = 10.0

_LENGTH = struct.Struct(">I")
_ENVELOPE_LIMIT = MESSAGE_LIMIT + 4096

Payload = Annotated[bytes, msgspec.Meta(max_length=MESSAGE_LIMIT)]
MessageT = TypeVar("MessageT")


class Request(msgspec.Struct, frozen=True, array_like=True, tag="request"):
    """`timeout` in seconds from arrival; after it nobody waits for the answer any more."""

    id: Count
    method: Identifier
    timeout: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_CALL)]
    payload: Payload


class Cast(msgspec.Struct, frozen=True, array_like=True, tag="cast"):
    method: Identifier
    payload: Payload


class Abandon(msgspec.Struct, frozen=True, array_like=True, tag="abandon"):
    """The caller no longer waits for the answer to request `id`."""

    id: Count


class Answer(msgspec.Struct, frozen=True, array_like=True, tag="answer"):
    id: Count
    payload: Payload


class Failure(msgspec.Struct, frozen=True, array_like=True, tag="failure"):
    id: Count
    code: Identifier
    message: Reason


_requests: msgspec.msgpack.Decoder[Request | Cast | Abandon] = msgspec.msgpack.Decoder(
    Request | Cast | Abandon
)
_answers: msgspec.msgpack.Decoder[Answer | Failure] = msgspec.msgpack.Decoder(Answer | Failure)
_encoder = msgspec.msgpack.Encoder()


def pack(message: object) -> bytes:
    data = _encoder.encode(message)
    return _LENGTH.pack(len(data)) + data


async def read_message(
    stream: YamuxStream, decoder: "msgspec.msgpack.Decoder[MessageT]"
) -> MessageT:
    """Raises `StreamClosed` at the end of the stream and for anything that is not a message."""
    (size,) = _LENGTH.unpack(await stream.read_exactly(_LENGTH.size))
    if size > _ENVELOPE_LIMIT:
        raise StreamClosed(f"refusing a message of {size} bytes")
    try:
        return decoder.decode(await stream.read_exactly(size))
    except DECODE_ERRORS as error:
        raise StreamClosed(f"a message that makes no sense: {error}") from error


class _Pending:
    def __init__(self) -> None:
        self.done = trio.Event()
        self.outcome: bytes | Exception | None = None

    def finish(self, outcome: bytes | Exception) -> None:
        if not self.done.is_set():
            self.outcome = outcome
            self.done.set()


class RpcClient:
    """Calls and casts to one peer over one connection; works while `run` runs.

    All writing is done by `run`, so a cancelled caller never leaves half a message behind.
    """

    def __init__(self, peer: str, open_stream: Callable[[str], Awaitable[YamuxStream]]) -> None:
        self._peer = peer
        self._open_stream = open_stream
        self._ids = itertools.count()
        self._slots = trio.Semaphore(CALLS_IN_FLIGHT)
        self._pending: dict[int, _Pending] = {}
        self._requests: dict[int, bytes] = {}
        self._abandoned: list[int] = []
        self._casts: DroppingQueue[bytes] = DroppingQueue()
        self._work = trio.Event()
        self._idle = trio.Event()
        self._closed = False

    async def call(self, method: str, payload: bytes, timeout: float) -> bytes:
        """Raises `PeerUnreachable`, `CallTimeout` or `CallFailed`. May be cancelled at any time."""
        with trio.move_on_after(timeout):
            async with self._slots:
                if self._closed:
                    raise PeerUnreachable(f"lost the connection to {self._peer}")
                return await self._exchange(method, payload, timeout)
        raise CallTimeout(f"{method}: no answer from {self._peer} within {timeout:g} s")

    async def _exchange(self, method: str, payload: bytes, timeout: float) -> bytes:
        number = next(self._ids)
        pending = self._pending[number] = _Pending()
        self._requests[number] = pack(
            Request(number, method, min(max(timeout, 0.0), LONGEST_CALL), payload)
        )
        self._work.set()
        try:
            await pending.done.wait()
        finally:
            del self._pending[number]
            unsent = self._requests.pop(number, None)
            if pending.outcome is None and unsent is None:
                self._abandoned.append(number)
                self._work.set()
        assert pending.outcome is not None
        if isinstance(pending.outcome, Exception):
            raise pending.outcome
        return pending.outcome

    def cast(self, method: str, payload: bytes) -> None:
        message = pack(Cast(method, payload))
        self._casts.put(message, len(message))
        self._work.set()

    @property
    def busy(self) -> bool:
        """Whether somebody waits for an answer, or something is still to be sent."""
        return bool(self._pending) or self._has_work()

    async def flush(self) -> None:
        """Wait until everything handed over so far is written. The caller sets a deadline."""
        while not self._closed and self._has_work():
            self._idle = trio.Event()
            await self._idle.wait()

    async def run(self) -> None:
        """Open a stream when there is something to send, and again after it broke."""
        try:
            while True:
                await self._wait_for_work()
                try:
                    await self._use_stream(await self._open_stream(PROTOCOL))
                except StreamClosed as error:
                    log.debug("the call stream to %s broke: %s", self._peer, error)
                self._fail_all()
                # A connection that has ended fails without a wait: let this task be cancelled.
                await trio.lowlevel.checkpoint()
        finally:
            self._closed = True
            self._idle.set()
            self._fail_all()

    async def _use_stream(self, stream: YamuxStream) -> None:
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, stream, nursery.cancel_scope)
            try:
                while True:
                    message = await read_message(stream, _answers)
                    pending = self._pending.get(message.id)
                    if pending is None:
                        continue
                    if isinstance(message, Answer):
                        pending.finish(message.payload)
                    else:
                        pending.finish(CallFailed(message.code, message.message))
            except StreamClosed as error:
                log.debug("the call stream to %s ended: %s", self._peer, error)
            finally:
                stream.reset()
                nursery.cancel_scope.cancel()

    async def _write(self, stream: YamuxStream, scope: trio.CancelScope) -> None:
        try:
            while True:
                await self._wait_for_work()
                await stream.write(self._next())
                if not self._has_work():
                    self._idle.set()
        except StreamClosed:
            scope.cancel()

    def _has_work(self) -> bool:
        return bool(self._requests or self._abandoned or self._casts)

    async def _wait_for_work(self) -> None:
        while not self._has_work():
            self._work = trio.Event()
            await self._work.wait()

    def _next(self) -> bytes:
        if self._abandoned:
            return pack(Abandon(self._abandoned.pop()))
        if self._requests:
            return self._requests.pop(next(iter(self._requests)))
        return self._casts.get_nowait()

    def _fail_all(self) -> None:
        self._requests.clear()
        self._abandoned.clear()
        self._casts.clear()
        for pending in self._pending.values():
            pending.finish(PeerUnreachable(f"lost the connection to {self._peer}"))


class RpcServer:
    """Answers the calls that arrive on one stream of one peer."""

    def __init__(self, peer: str, stream: YamuxStream, services: Services) -> None:
        self._peer = peer
        self._stream = stream
        self._services = services
        self._running: dict[int, trio.CancelScope] = {}
        self._bytes = 0
        self._casts: DroppingQueue[Cast] = DroppingQueue()
        self._answers, self._to_write = trio.open_memory_channel[bytes](0)

    @property
    def busy(self) -> bool:
        """Whether the peer waits for an answer."""
        return bool(self._running)

    async def run(self) -> None:
        """Serve until the stream ends; what still runs for the peer then is cancelled."""
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._write, nursery.cancel_scope)
            nursery.start_soon(self._serve_casts)
            try:
                while True:
                    message = await read_message(self._stream, _requests)
                    if isinstance(message, Request):
                        await self._start(message, nursery)
                    elif isinstance(message, Cast):
                        self._casts.put(message, len(message.payload))
                    elif message.id in self._running:
                        self._running[message.id].cancel()
            except StreamClosed as error:
                log.debug("the calls of %s ended: %s", self._peer, error)
            finally:
                nursery.cancel_scope.cancel()

    async def _start(self, request: Request, nursery: trio.Nursery) -> None:
        if request.id in self._running:
            raise StreamClosed(f"call {request.id} came twice")
        size = len(request.payload)
        if len(self._running) >= CALLS_SERVED or self._bytes + size > BYTES_SERVED:
            # Waiting here holds the peer back until it reads.
            message = f"{len(self._running)} calls of this peer are running, {self._bytes} bytes"
            await self._answers.send(pack(Failure(request.id, "busy", message)))
            return
        scope = self._running[request.id] = trio.CancelScope()
        self._bytes += size
        nursery.start_soon(self._serve, request, scope)

    async def _serve(self, request: Request, scope: trio.CancelScope) -> None:
        scope.deadline = trio.current_time() + request.timeout
        try:
            with scope:
                await self._answers.send(pack(await self._answer(request)))
        finally:
            del self._running[request.id]
            self._bytes -= len(request.payload)

    async def _answer(self, request: Request) -> Answer | Failure:
        try:
            payload = await self._services.answer(self._peer, request.method, request.payload)
        except CallFailed as error:
            message = str(error).removeprefix(f"{error.code}: ")
            return Failure(request.id, error.code[:128] or "failed", message[:2000])
        return Answer(request.id, payload)

    async def _serve_casts(self) -> None:
        while True:
            cast = await self._casts.get()
            try:
                with trio.fail_after(CAST_TIMEOUT):
                    await self._services.answer(self._peer, cast.method, cast.payload)
            except CallFailed as error:
                log.debug("a %s of %s failed: %s", cast.method, self._peer, error)
            except trio.TooSlowError:
                log.warning("a %s of %s took over %g s", cast.method, self._peer, CAST_TIMEOUT)

    async def _write(self, scope: trio.CancelScope) -> None:
        try:
            async for message in self._to_write:
                await self._stream.write(message)
        except StreamClosed:
            scope.cancel()
