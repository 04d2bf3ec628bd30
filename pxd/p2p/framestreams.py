"""What a data channel runs on: a `TlsStream`, or a stream of the libp2p connection."""

from typing import Protocol

from pxd.p2p.host import Connection
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.wire import Buffer

COALESCE = 16 * 1024


class FrameStream(Protocol):
    """Raises `StreamClosed` once the stream has ended. One task reads, one writes.

    A cancelled read or write leaves the stream at an unknown place: close it then.
    """

    async def write(self, *parts: Buffer) -> None:
        """All parts, one after the other."""

    async def read_exactly(self, count: int) -> Buffer: ...

    def close(self) -> None:
        """Now, whatever is blocked on it."""


class Libp2pFrames:
    def __init__(self, connection: Connection, stream: YamuxStream) -> None:
        self._connection = connection
        self._stream = stream

    @property
    def relayed(self) -> bool:
        return bool(self._connection.relay)

    async def drain(self) -> None:
        """After the last frame: return when the peer has handled all of them.

        Raises `StreamClosed` when the connection ended before.
        """
        self._stream.finish()
        try:
            await self._stream.read_exactly(1)
        except StreamClosed:
            if self._connection.muxer.closed.is_set():
                raise

    async def write(self, *parts: Buffer) -> None:
        if sum(map(len, parts)) <= COALESCE:
            await self._stream.write(b"".join(parts))
        else:
            for part in parts:
                await self._stream.write(part)

    async def read_exactly(self, count: int) -> Buffer:
        return await self._stream.read_exactly(count)

    def close(self) -> None:
        self._stream.reset()
