"""A relay: passes bytes on between two members that are both connected with this node.

The other side of `pxd.p2p.circuit`. Runs only where somebody started the node with ``--relay``. It
holds no more than a window of bytes per direction, waits for a slow end rather than buffer, and
never goes through a further relay, so there are no chains and no loops.
"""

import logging
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import trio
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, Status, StopMessage

from pxd.p2p.circuit import (
    HANDSHAKE_TIMEOUT,
    STOP,
    WINDOW,
    Malformed,
    let_close,
    peer_in,
    peer_message,
    read_message,
    write_message,
)
from pxd.p2p.host import Connection
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.sessions import Sessions

log = logging.getLogger("pxd.p2p")

CIRCUITS = 128
CIRCUITS_PER_MEMBER = 16
"""Of which it is either end."""

IDLE_TIMEOUT = 30.0
"""Seconds without a byte in either direction. Nodes that live ping each other far more often."""

CHUNK = 64 * 1024


class _Refused(Exception):
    def __init__(self, status: Status.ValueType) -> None:
        super().__init__(Status.Name(status))
        self.status = status


class Relay:
    """Serves `HOP` for members. `banned` are peers that it does nothing for."""

    def __init__(self, sessions: Sessions, banned: Callable[[], frozenset[str]]) -> None:
        self._sessions = sessions
        self._banned = banned
        self._ends: Counter[str] = Counter()
        self._circuits = 0

    async def serve(self, connection: Connection, stream: YamuxStream) -> None:
        """Connect the stream with the peer that its first message names, until either end is done.

        What is refused is answered with one of libp2p's status codes.
        """
        stream.window = WINDOW
        try:
            with trio.fail_after(HANDSHAKE_TIMEOUT):
                target = self._target(connection, await _read_request(stream))
            with self._slot(connection.peer, target.peer):
                onward = await _reach(target, connection.peer)
                try:
                    await _answer(stream, Status.OK)
                    log.debug("passing on between %s and %s", connection.peer, target.peer)
                    await pass_on(stream, onward)
                finally:
                    onward.reset()
        except _Refused as refused:
            log.debug("no circuit for %s: %s", connection.peer, refused)
            await _answer(stream, refused.status)
            await let_close(stream)

    def _target(self, connection: Connection, peer: str) -> Connection:
        """The connection to pass on to. Raises `_Refused`."""
        if connection.relay or {peer, connection.peer} & self._banned() or peer == connection.peer:
            raise _Refused(Status.PERMISSION_DENIED)
        session = self._sessions.get(peer)
        if session is None or not session.direct:
            raise _Refused(Status.NO_RESERVATION)
        return session.connection

    @contextmanager
    def _slot(self, *ends: str) -> Iterator[None]:
        if self._circuits >= CIRCUITS or any(
            self._ends[peer] >= CIRCUITS_PER_MEMBER for peer in ends
        ):
            raise _Refused(Status.RESOURCE_LIMIT_EXCEEDED)
        self._circuits += 1
        self._ends.update(ends)
        try:
            yield
        finally:
            self._circuits -= 1
            self._ends.subtract(ends)
            self._ends += Counter()


async def _read_request(stream: YamuxStream) -> str:
    """The peer that is asked for. Raises `_Refused`."""
    try:
        message = await read_message(stream, HopMessage)
    except Malformed as error:
        raise _Refused(Status.MALFORMED_MESSAGE) from error
    if message.type == HopMessage.RESERVE:
        raise _Refused(Status.RESERVATION_REFUSED)
    if message.type != HopMessage.CONNECT:
        raise _Refused(Status.UNEXPECTED_MESSAGE)
    peer = peer_in(message.peer)
    if not peer:
        raise _Refused(Status.MALFORMED_MESSAGE)
    return peer


async def _reach(target: Connection, caller: str) -> YamuxStream:
    """A stream on which the target expects to hear from `caller`. Raises `_Refused`."""
    try:
        stream = await target.open_stream(STOP)
    except StreamClosed as error:
        raise _Refused(Status.CONNECTION_FAILED) from error
    stream.window = WINDOW
    try:
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            peer = peer_message(caller)
            await write_message(stream, StopMessage(type=StopMessage.CONNECT, peer=peer))
            answer = await read_message(stream, StopMessage)
        if answer.type != StopMessage.STATUS or answer.status != Status.OK:
            raise _Refused(Status.PERMISSION_DENIED)
    except (StreamClosed, trio.TooSlowError) as error:
        stream.reset()
        raise _Refused(Status.CONNECTION_FAILED) from error
    except BaseException:
        stream.reset()
        raise
    return stream


async def _answer(stream: YamuxStream, status: Status.ValueType) -> None:
    with trio.fail_after(HANDSHAKE_TIMEOUT):
        await write_message(stream, HopMessage(type=HopMessage.STATUS, status=status))


async def pass_on(one: YamuxStream, other: YamuxStream) -> None:
    """Copy both ways until an end is done, or nothing moved for `IDLE_TIMEOUT` seconds."""
    with trio.CancelScope() as idle:

        def moved() -> None:
            idle.deadline = trio.current_time() + IDLE_TIMEOUT

        async def copy(source: YamuxStream, sink: YamuxStream) -> None:
            try:
                while data := await source.read_some(CHUNK):
                    moved()
                    await sink.write(data)
                    moved()
            except StreamClosed as error:
                log.debug("an end of a circuit is done: %s", error)
            idle.cancel()

        moved()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(copy, one, other)
            nursery.start_soon(copy, other, one)
