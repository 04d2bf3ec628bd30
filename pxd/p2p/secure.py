"""From a byte stream to an authenticated, encrypted libp2p connection: multistream, Noise, Yamux.

The wire format and the cryptography are libp2p's; its Swarm and BasicHost are not used, because
their defaults and their error handling cannot be made safe from outside.
"""

import logging
import os
import socket
from abc import ABC, abstractmethod
from typing import Any, cast

import trio
from libp2p.crypto.ed25519 import create_new_key_pair
from libp2p.crypto.x25519 import X25519PrivateKey
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import ConnectionClosedError, IOException
from libp2p.network.connection.raw_connection import RawConnection
from libp2p.peer.id import ID
from libp2p.protocol_muxer.exceptions import MultiselectCommunicatorError
from libp2p.protocol_muxer.multiselect import Multiselect
from libp2p.protocol_muxer.multiselect_client import MultiselectClient
from libp2p.security.noise.transport import PROTOCOL_ID as NOISE
from libp2p.security.noise.transport import Transport as NoiseTransport
from libp2p.utils.varint import decode_uvarint, encode_delim

from pxd.p2p.addresses import host_in
from pxd.p2p.muxer import StreamClosed

YAMUX = "/yamux/1.0.0"
NEGOTIATION_LIMIT = 1024
READ_AHEAD = 64 * 1024
HANDSHAKE_HASH_BYTES = 32

# Every refused or broken connection makes libp2p log tracebacks; the reasons are logged here.
if "LIBP2P_DEBUG" not in os.environ:
    logging.getLogger("libp2p").setLevel(logging.CRITICAL)


class Transport(ABC):
    """A byte stream as libp2p wants it below a connection: reads are exact and bounded, an end
    raises ConnectionClosedError."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    async def read(self, n: int | None = None) -> bytes:
        """Exactly `n` bytes, all that libp2p's Noise asks for: at most 65535."""
        if n is None or not 0 <= n <= READ_AHEAD:
            raise ConnectionClosedError(f"a read of {n} bytes")
        while len(self._buffer) < n:
            data = await self._receive()
            if not data:
                raise ConnectionClosedError("the peer closed the connection")
            self._buffer += data
        data = bytes(self._buffer[:n])
        del self._buffer[:n]
        return data

    @abstractmethod
    async def _receive(self) -> bytes:
        """At most `READ_AHEAD` bytes; b"" at the end."""

    @abstractmethod
    async def write(self, data: bytes) -> None: ...

    async def close(self) -> None:
        self.abort()

    @abstractmethod
    def abort(self) -> None:
        """End it now; whatever is blocked on it raises."""


class TcpStream(Transport):
    """A trio socket."""

    def __init__(self, stream: trio.SocketStream) -> None:
        super().__init__()
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._stream = stream
        self.local_host = host_in(stream.socket.getsockname())

    async def _receive(self) -> bytes:
        try:
            return bytes(await self._stream.receive_some(READ_AHEAD))
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error)) from error

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.send_all(data)
        except (trio.BrokenResourceError, trio.ClosedResourceError) as error:
            raise ConnectionClosedError(str(error)) from error

    def abort(self) -> None:
        self._stream.socket.close()


class BoundedCommunicator:
    """Multistream messages, at most `NEGOTIATION_LIMIT` bytes each; libp2p's own has no limit."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    async def write(self, message: str | None) -> None:
        try:
            await self._stream.write(encode_delim((message or "").encode()))
        except (IOException, StreamClosed) as error:
            raise MultiselectCommunicatorError(str(error)) from error

    async def read(self) -> str:
        try:
            prefix = b""
            while not prefix or prefix[-1] & 0x80:
                prefix += await self._read_exactly(1)
                if len(prefix) > 2:
                    raise ParseError("a length beyond the limit")
            size = decode_uvarint(prefix)
            if not 0 < size <= NEGOTIATION_LIMIT:
                raise ParseError(f"a message of {size} bytes")
            message = bytes(await self._read_exactly(size))
            if not message.endswith(b"\n"):
                raise ParseError("no newline at the end")
            return message[:-1].decode()
        except (IOException, StreamClosed, ParseError, UnicodeDecodeError) as error:
            raise MultiselectCommunicatorError(str(error)) from error

    async def _read_exactly(self, count: int) -> bytes | bytearray:
        if hasattr(self._stream, "read_exactly"):
            return cast(bytearray, await self._stream.read_exactly(count))
        return cast(bytes, await self._stream.read(count))


class NoiseConnection:
    """A connection after the Noise handshake, as `Yamux` wants it. `peer` is authenticated.

    `binding` is the hash of the whole handshake: both ends have the same, no other session has it.
    """

    def __init__(self, session: Any, stream: Transport) -> None:
        self.peer = str(session.get_remote_peer())
        self.binding = handshake_hash(session)
        self._session = session
        self._stream = stream

    async def read(self) -> bytes:
        return cast(bytes, await self._session.read())

    async def write(self, data: bytes) -> None:
        await self._session.write(data)

    def abort(self) -> None:
        self._stream.abort()

    @property
    def local_host(self) -> str:
        """This machine's IP address at this end, with its zone; empty where there is none."""
        return getattr(self._stream, "local_host", "")


class Identity:
    """This node's libp2p keys; makes authenticated connections out of byte streams."""

    def __init__(self, seed: bytes) -> None:
        keys = create_new_key_pair(seed)
        self.peer_id = str(ID.from_pubkey(keys.public_key))
        self._noise = NoiseTransport(keys, noise_privkey=X25519PrivateKey.new())

    async def secure_outbound(
        self, stream: Transport | trio.SocketStream, peer: str
    ) -> NoiseConnection:
        """Raises any exception when the other end is not `peer` or does not speak libp2p.

        The caller sets the deadline and closes the stream when this fails.
        """
        stream = _transport(stream)
        raw = RawConnection(stream, True)
        await select([NOISE], raw)
        session = await self._noise.secure_outbound(raw, ID.from_base58(peer))
        await select([YAMUX], session)
        return NoiseConnection(session, stream)

    async def secure_inbound(self, stream: Transport | trio.SocketStream) -> NoiseConnection:
        """Like `secure_outbound`, for a peer that is known only afterwards."""
        stream = _transport(stream)
        raw = RawConnection(stream, False)
        await answer([NOISE], raw)
        session = await self._noise.secure_inbound(raw)
        await answer([YAMUX], session)
        return NoiseConnection(session, stream)


def _transport(stream: Transport | trio.SocketStream) -> Transport:
    return stream if isinstance(stream, Transport) else TcpStream(stream)


def handshake_hash(session: Any) -> bytes:
    """What Noise calls h, 32 bytes: it covers the fresh keys of both ends and all that was said.

    Raises rather than return anything else, so that no proof is ever bound to nothing.
    """
    found = session.conn.noise_state.get_handshake_hash()
    if not isinstance(found, bytes) or len(found) != HANDSHAKE_HASH_BYTES:
        raise TypeError("libp2p's Noise session has no handshake hash")
    return found


async def select(protocols: list[str], stream: Any) -> None:
    """Agree on one of `protocols` as the side that opened `stream`. Raises MultiselectError."""
    await MultiselectClient().select_one_of(protocols, BoundedCommunicator(stream))


async def answer(protocols: list[str], stream: Any) -> str:
    """Agree on one of `protocols` as the other side. Raises MultiselectError."""
    selector = Multiselect(dict.fromkeys(protocols))
    protocol, _ = await selector.negotiate(BoundedCommunicator(stream))
    return cast(str, protocol)
