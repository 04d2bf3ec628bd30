"""Under which address a peer sees this node: what a node behind NAT cannot know by itself.

Speaks libp2p's identify, ``/ipfs/id/1.0.0``, of which only the observed address is told and used.
It belongs to the one connection that it is asked on. What comes back is a hint and nothing more.
"""

import ipaddress

import trio
from libp2p.identity.identify.pb.identify_pb2 import Identify

from pxd.p2p.circuit import let_close, read_message, write_message
from pxd.p2p.host import Connection
from pxd.p2p.muxer import StreamClosed, YamuxStream

PROTOCOL = "/ipfs/id/1.0.0"
TIMEOUT = 3.0

_IP4, _IP6, _TCP = b"\x04", b"\x29", b"\x06"
"""Codes of multiaddr's binary form, https://github.com/multiformats/multiaddr."""

Endpoint = tuple[str, int]
"""An IP address and a TCP port."""


def encode_endpoint(endpoint: Endpoint) -> bytes:
    """As a binary multiaddr. Raises ValueError for a host that is no IP address."""
    ip = _plain(ipaddress.ip_address(endpoint[0].partition("%")[0]))
    return (_IP4 if ip.version == 4 else _IP6) + ip.packed + _TCP + endpoint[1].to_bytes(2, "big")


def decode_endpoint(data: bytes) -> Endpoint:
    """Raises ValueError for whatever is not an IP address and a TCP port."""
    size = {_IP4: 4, _IP6: 16}.get(data[:1])
    if size is None or len(data) != 1 + size + 3 or data[1 + size : 2 + size] != _TCP:
        raise ValueError("not an IP address with a TCP port")
    port = int.from_bytes(data[-2:], "big")
    if not port:
        raise ValueError("port 0")
    return str(_plain(ipaddress.ip_address(data[1 : 1 + size]))), port


def _plain(
    ip: ipaddress.IPv4Address | ipaddress.IPv6Address,
) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return getattr(ip, "ipv4_mapped", None) or ip


async def tell(connection: Connection, stream: YamuxStream) -> None:
    """Serve `PROTOCOL`."""
    message = Identify()
    if connection.host:
        _, _, port = connection.address.rpartition(":")
        message.observed_addr = encode_endpoint((connection.host, int(port)))
    with trio.fail_after(TIMEOUT):
        await write_message(stream, message)
    await let_close(stream)


async def ask(connection: Connection) -> Endpoint | None:
    """How the other end of a direct connection sees this one; None if it does not say."""
    try:
        with trio.fail_after(TIMEOUT):
            stream = await connection.open_stream(PROTOCOL)
            try:
                message = await read_message(stream, Identify)
            finally:
                stream.reset()
        return decode_endpoint(message.observed_addr)
    except (StreamClosed, ValueError, trio.TooSlowError):
        return None
