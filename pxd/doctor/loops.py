"""Does multicast leave this machine and come back? One harmless mDNS query per interface."""

import secrets
import socket
import struct
import sys

import msgspec
import trio

from pxd.doctor.interfaces import Interface

GROUP, PORT = "224.0.0.251", 5353
WAIT_S = 1.0
TRIES = 2


class Loop(msgspec.Struct, frozen=True):
    """One interface's test. `failure` is empty when the packet came back; `answers` are the hosts
    of other pxd nodes that answered the query meanwhile."""

    interface: Interface
    failure: str = ""
    answers: tuple[str, ...] = ()


def query() -> bytes:
    """A question for `_pxd._tcp.local`, with an id of its own to know it again."""
    name = b"".join(bytes([len(part)]) + part for part in (b"_pxd", b"_tcp", b"local")) + b"\0"
    header = secrets.token_bytes(2) + struct.pack(">HHHHH", 0, 1, 0, 0, 0)
    return header + name + struct.pack(">HH", 12, 1)


def _receiver(address: str) -> trio.socket.SocketType:
    receiver = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if hasattr(socket, "SO_REUSEPORT"):
            receiver.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        member = socket.inet_aton(GROUP) + socket.inet_aton(address)
        receiver.setsockopt(socket.IPPROTO_IP, socket.IP_ADD_MEMBERSHIP, member)
        return receiver
    except BaseException:
        receiver.close()
        raise


def _sender(address: str) -> trio.socket.SocketType:
    sender = trio.socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    try:
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_IF, socket.inet_aton(address))
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_LOOP, 1)
        sender.setsockopt(socket.IPPROTO_IP, socket.IP_MULTICAST_TTL, 255)
        return sender
    except BaseException:
        sender.close()
        raise


async def test(interface: Interface) -> Loop:
    """Takes at most `TRIES` times `WAIT_S`, or `WAIT_S` where the packet comes back."""
    try:
        with _receiver(interface.address) as receiver, _sender(interface.address) as sender:
            # On macOS a socket bound to the group gets nothing that was sent here.
            await receiver.bind(("" if sys.platform == "darwin" else GROUP, PORT))
            await sender.bind((interface.address, 0))
            return await _exchange(interface, receiver, sender)
    except OSError as error:
        return Loop(interface, str(error.strerror or error))


async def _exchange(
    interface: Interface, receiver: trio.socket.SocketType, sender: trio.socket.SocketType
) -> Loop:
    packet = query()
    heard: set[str] = set()
    back = trio.Event()
    failure = f"a packet sent to {GROUP} port {PORT} did not come back"

    async def listen() -> None:
        while True:
            data, _ = await receiver.recvfrom(2048)
            if data == packet:
                back.set()

    async def collect() -> None:
        while True:
            data, source = await sender.recvfrom(4096)
            # Whoever answers a query from another port than 5353 repeats its id (RFC 6762, 6.7).
            if data[:2] == packet[:2] and b"_pxd" in data and source[0] != interface.address:
                heard.add(source[0])

    async with trio.open_nursery() as nursery:
        nursery.start_soon(listen)
        nursery.start_soon(collect)
        for _ in range(TRIES):
            try:
                await sender.sendto(packet, (GROUP, PORT))
            except OSError as error:
                # That is how a rule for what goes out shows itself.
                why = error.strerror or error
                failure = f"a packet to {GROUP} port {PORT} could not be sent ({why})"
                break
            with trio.move_on_after(WAIT_S):
                await back.wait()
                # The rest of the time is for the answers of others.
                await trio.sleep(WAIT_S)
            if back.is_set():
                break
        nursery.cancel_scope.cancel()
    return Loop(interface, "" if back.is_set() else failure, tuple(sorted(heard)))


async def test_all(interfaces: tuple[Interface, ...]) -> tuple[Loop, ...]:
    """All interfaces that say they can do multicast, at once; in their order."""
    capable = [interface for interface in interfaces if interface.multicast]
    loops: dict[Interface, Loop] = {}

    async def one(interface: Interface) -> None:
        loops[interface] = await test(interface)

    async with trio.open_nursery() as nursery:
        for interface in capable:
            nursery.start_soon(one, interface)
    return tuple(loops[interface] for interface in capable)
