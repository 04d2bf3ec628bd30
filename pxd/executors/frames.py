"""Frames between an executor's processes, and that each lives no longer than the one above it."""

import os
import select
import socket
import threading
from collections.abc import Callable
from io import BufferedReader
from typing import Any, Generic, TypeVar, cast

import msgspec

from pxd.wire import PREFIX_SIZE, Buffer, Limits, decode_header, decode_prefix, encode

HeaderT = TypeVar("HeaderT")

CHECK_MS = 1000
READ_AHEAD = 64 << 10
COALESCE = 16 << 10

_GONE = select.POLLHUP | select.POLLERR | select.POLLNVAL


class FrameSocket(Generic[HeaderT]):
    """Blocking frames over a stream socket; what comes in is read by `decoder`."""

    def __init__(
        self, connection: socket.socket, decoder: "msgspec.msgpack.Decoder[HeaderT]"
    ) -> None:
        self._connection = connection
        self._decoder = decoder
        self._incoming = cast(BufferedReader, connection.makefile("rb", buffering=READ_AHEAD))
        self._limits = Limits()
        self._sending = threading.Lock()

    def receive(self) -> tuple[HeaderT, Buffer]:
        """Raises `EOFError` when the other end is closed, and `WireError`."""
        header_size, body_size = decode_prefix(self._read(PREFIX_SIZE), self._limits)
        header = decode_header(self._read(header_size), body_size, self._decoder)
        return header, self._read(body_size)

    def send(self, header: Any, body: Buffer = b"") -> None:
        data = encode(header, len(body), self._limits)
        with self._sending:
            if len(body) <= COALESCE:
                self._connection.sendall(b"".join((data, body)))
            else:
                self._connection.sendall(data)
                self._connection.sendall(body)

    def close(self) -> None:
        self._incoming.close()
        self._connection.close()

    def _read(self, size: int) -> bytearray:
        data = bytearray(size)
        if self._incoming.readinto(data) < size:
            raise EOFError
        return data


def exit_with_parent(connection: socket.socket) -> None:
    """End this process at once when its parent lets go of the other end, whatever is running."""
    parent = os.getppid()
    _watch(connection, lambda: os._exit(0), lambda: os.getppid() == parent)


def when_gone(connection: socket.socket, act: Callable[[], None]) -> None:
    """Call `act` in another thread when the other end is closed."""
    _watch(connection, act, lambda: True)


def _watch(
    connection: socket.socket, act: Callable[[], None], is_there: Callable[[], bool]
) -> None:
    def run() -> None:
        poller = select.poll()
        poller.register(connection, 0)  # hang-up is always reported
        while is_there() and not any(events & _GONE for _, events in poller.poll(CHECK_MS)):
            pass
        act()

    threading.Thread(target=run, name="other-end", daemon=True).start()
