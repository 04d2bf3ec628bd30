"""What a data channel runs on: a direct TLS connection, or a stream of the libp2p connection."""

import socket
from typing import Protocol

import trio

from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.wire import Buffer

COALESCE = 16 * 1024
CHUNK = 256 * 1024
KEEPALIVE = {"TCP_KEEPIDLE": 10, "TCP_KEEPALIVE": 10, "TCP_KEEPINTVL": 3, "TCP_KEEPCNT": 3}


class FrameStream(Protocol):
    """Raises `StreamClosed` once the stream has ended. One task reads, one writes."""

    kind: str

    async def write(self, data: Buffer) -> None: ...

    async def read_exactly(self, count: int) -> Buffer: ...

    def close(self) -> None:
        """Now, whatever is blocked on it."""


class TlsFrames:
    kind = "tls"

    def __init__(self, tls: trio.SSLStream, transport: trio.SocketStream) -> None:
        self._tls = tls
        self._socket = transport.socket
        self._socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for name, value in KEEPALIVE.items():
            if hasattr(socket, name):
                self._socket.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)
        self._buffer = bytearray()

    async def write(self, data: Buffer) -> None:
        view = memoryview(data)
        try:
            for start in range(0, len(view), CHUNK):
                await self._tls.send_all(view[start : start + CHUNK])
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosed(str(error)) from error

    async def read_exactly(self, count: int) -> Buffer:
        """A cancelled read loses its place: close the stream then."""
        data = self._buffer
        self._buffer = bytearray()
        try:
            while len(data) < count:
                received = await self._tls.receive_some(CHUNK)
                if not received:
                    raise StreamClosed("the peer closed the channel")
                data += received
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise StreamClosed(str(error)) from error
        if len(data) > count:
            self._buffer = data[count:]
            del data[count:]
        return data

    def close(self) -> None:
        self._socket.close()


class Libp2pFrames:
    kind = "libp2p"

    def __init__(self, stream: YamuxStream) -> None:
        self._stream = stream

    async def write(self, data: Buffer) -> None:
        await self._stream.write(data)

    async def read_exactly(self, count: int) -> Buffer:
        return await self._stream.read_exactly(count)

    def close(self) -> None:
        self._stream.reset()


async def write_frame(stream: FrameStream, header: bytes, body: Buffer) -> None:
    """`header` as `wire.encode` made it. A small frame leaves in one piece."""
    if len(body) <= COALESCE:
        await stream.write(b"".join((header, body)))
    else:
        await stream.write(header)
        await stream.write(body)
