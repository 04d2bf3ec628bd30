"""A connection through another member: libp2p's circuit relay v2, as its two ends speak it.

Follows https://github.com/libp2p/specs/blob/master/relay/circuit-v2.md: protocol ids, messages and
status codes are libp2p's own (its service classes are not used: they need libp2p's host, and
answer anybody). Left out are reservations and vouchers, with which a public relay keeps strangers
in check: here only members are served, and to be connected with the relay is the reservation.

What passes a circuit is the same Noise connection with the same key proof as over TCP, so a relay
sees how much and when, not what, and cannot pose as anybody.
"""

import contextlib
import logging
from collections.abc import Callable
from typing import Any

import trio
from google.protobuf.message import DecodeError
from libp2p.exceptions import ParseError
from libp2p.io.exceptions import ConnectionClosedError
from libp2p.peer.id import ID
from libp2p.relay.circuit_v2.pb.circuit_pb2 import HopMessage, PeerId, Status, StopMessage
from libp2p.utils.varint import decode_uvarint, encode_varint_prefixed

from pxd.p2p.addresses import Address, parse_address
from pxd.p2p.host import Connection, DialFailed, Host, Route
from pxd.p2p.muxer import StreamClosed, YamuxStream
from pxd.p2p.secure import READ_AHEAD, Transport

log = logging.getLogger("pxd.p2p")

HOP = "/libp2p/circuit/relay/0.2.0/hop"
STOP = "/libp2p/circuit/relay/0.2.0/stop"

MESSAGE_LIMIT = 4096
HANDSHAKE_TIMEOUT = 5.0
WINDOW = 256 * 1024
"""Bytes that each end of a circuit, and the relay for each direction, buffers at most."""

_LONGEST_ID = 64
SEPARATOR = "/p2p-circuit/p2p/"


class Malformed(StreamClosed):
    """Bytes that are no message: the stream that they came on is of no use any more."""


class CircuitRefused(DialFailed):
    """The relay does not pass this node on; `status` is one of libp2p's circuit status codes."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__("unreachable", message)
        self.status = status


_REFUSALS = {
    Status.RESOURCE_LIMIT_EXCEEDED: "passes on as many connections as it may",
    Status.PERMISSION_DENIED: "does not pass this one on",
    Status.CONNECTION_FAILED: "got no answer from there",
    Status.NO_RESERVATION: "is not connected with it",
}


class CircuitStream(Transport):
    """A stream of the connection with the relay, on which the other end speaks."""

    def __init__(self, stream: YamuxStream) -> None:
        super().__init__()
        self._stream = stream

    async def _receive(self) -> bytes:
        try:
            return await self._stream.read_some(READ_AHEAD)
        except StreamClosed as error:
            raise ConnectionClosedError(str(error)) from error

    async def write(self, data: bytes) -> None:
        try:
            await self._stream.write(data)
        except StreamClosed as error:
            raise ConnectionClosedError(str(error)) from error

    def abort(self) -> None:
        self._stream.reset()


class Circuits:
    """This node's ends of circuits."""

    def __init__(self, host: Host) -> None:
        self._host = host

    async def dial(self, relay: Connection, peer: str) -> Connection:
        """Return an admitted connection with `peer` through the member at the other end of `relay`.

        Raises `DialFailed`; `CircuitRefused` when the relay says no.
        """

        async def open_circuit() -> Transport:
            try:
                stream = await relay.open_stream(HOP)
            except StreamClosed as error:
                raise DialFailed("unreachable", "it does not pass traffic on") from error
            stream.window = WINDOW
            try:
                await _ask(stream, peer)
            except BaseException as error:
                stream.reset()
                if isinstance(error, StreamClosed):
                    raise DialFailed("unreachable", f"it broke off ({error})") from error
                raise
            return CircuitStream(stream)

        return await self._host.dial_over(open_circuit, peer, _through(relay))

    async def serve(self, connection: Connection, stream: YamuxStream) -> None:
        """Serve `STOP`: a relay passes somebody on to this node. Returns when that has ended."""
        stream.window = WINDOW
        with trio.fail_after(HANDSHAKE_TIMEOUT):
            message = await read_message(stream, StopMessage)
            peer = peer_in(message.peer)
            status = Status.OK
            if message.type != StopMessage.CONNECT or not peer:
                status = Status.MALFORMED_MESSAGE
            elif connection.relay or peer in self._host.banned:
                status = Status.PERMISSION_DENIED
            await write_message(stream, StopMessage(type=StopMessage.STATUS, status=status))
        if status == Status.OK:
            await self._host.accept(CircuitStream(stream), _through(connection), peer)
        else:
            await let_close(stream)


def _through(relay: Connection) -> Route:
    return Route(f"the relay {relay.peer}", relay=relay.peer)


async def _ask(stream: YamuxStream, peer: str) -> None:
    """Raises `CircuitRefused` unless the relay has connected `stream` with `peer`."""
    await write_message(stream, HopMessage(type=HopMessage.CONNECT, peer=peer_message(peer)))
    answer = await read_message(stream, HopMessage)
    if answer.type != HopMessage.STATUS:
        raise Malformed("an answer without a status")
    if answer.status != Status.OK:
        message = _REFUSALS.get(answer.status, f"refuses with status {answer.status}")
        raise CircuitRefused(answer.status, message)


def split_circuit(text: str) -> tuple[Address, str]:
    """The relay's address and the peer behind it, of ``RELAY/p2p-circuit/p2p/PEER``.

    Raises ValueError for anything else.
    """
    relay, separator, peer = text.partition(SEPARATOR)
    address = parse_address(relay)
    if not separator or parse_address(f"/ip4/0.0.0.0/tcp/1/p2p/{peer}").peer == address.peer:
        raise ValueError(f"{text!r} does not lead through a relay to another node")
    return address, peer


def join_circuit(relay: Address, peer: str) -> str:
    return f"{relay}{SEPARATOR}{peer}"


def peer_message(peer: str) -> PeerId:
    return PeerId(id=ID.from_base58(peer).to_bytes())


def peer_in(message: Any) -> str:
    """The peer id in a libp2p `PeerId` message, empty where there is none of usable length."""
    return ID(message.id).to_base58() if 0 < len(message.id) <= _LONGEST_ID else ""


async def write_message(stream: YamuxStream, message: Any) -> None:
    """A protobuf message behind its length, as all these protocols want it."""
    await stream.write(encode_varint_prefixed(message.SerializeToString()))


async def let_close(stream: YamuxStream) -> None:
    """After the last word: wait a while for the other end to close the stream, for a reset may
    overtake what it has not read yet."""
    stream.finish()
    with trio.move_on_after(HANDSHAKE_TIMEOUT), contextlib.suppress(StreamClosed):
        await stream.read_exactly(MESSAGE_LIMIT)


async def read_message(stream: YamuxStream, kind: Callable[[], Any]) -> Any:
    """A message of this protobuf class, at most `MESSAGE_LIMIT` bytes. Raises `StreamClosed`, and
    `Malformed` for bytes that are none. The caller sets the deadline."""
    prefix = b""
    while not prefix or prefix[-1] & 0x80:
        prefix += await stream.read_exactly(1)
        if len(prefix) > 2:
            raise Malformed("a length beyond the limit")
    message = kind()
    try:
        size = decode_uvarint(prefix)
        if size > MESSAGE_LIMIT:
            raise Malformed(f"a message of {size} bytes")
        message.ParseFromString(bytes(await stream.read_exactly(size)))
    except (DecodeError, ParseError) as error:
        raise Malformed(str(error)) from error
    return message
