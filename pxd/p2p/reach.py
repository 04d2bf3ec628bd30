"""Dialling back: a member tells another one at which of its addresses it can really be reached.

Whoever asks has proved the cluster key, but may still not use this node to scan networks: only the
addresses in its own record are tried, loopback only for one that came in over loopback, few at a
time, and seldom.
"""

import ipaddress
import logging
import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import Annotated, Literal

import msgspec
import trio
from libp2p.security.noise.exceptions import PeerIDMismatchesPubkey

from pxd.p2p.addresses import Address, parse_peer_addresses
from pxd.p2p.interfaces import local_addresses
from pxd.p2p.network import CallFailed, Method
from pxd.p2p.routes import routes
from pxd.p2p.secure import Identity

log = logging.getLogger("pxd.p2p")

MAX_ADDRESSES = 16
PROBE_TIMEOUT = 3.0
AT_ONCE = 4
BURST = 5
REFILL_SECONDS = 10.0
REQUESTERS = 1024

Outcome = Literal["ok", "refused", "timeout", "unreachable", "other", "skipped"]
"""What came of a connection attempt. `other`: something else than the asking node answers there;
`skipped`: this node does not dial such an address, or need not."""


class DialBack(msgspec.Struct, frozen=True):
    """Asks for connections to all addresses in the caller's record, and to its data port there."""

    data_port: Annotated[int, msgspec.Meta(ge=0, le=65535)]


class Dialled(msgspec.Struct, frozen=True, array_like=True):
    """What came of dialling one address: its listen port, and the data port on the same host."""

    address: Annotated[str, msgspec.Meta(max_length=512)]
    listen: Outcome
    data: Outcome


class DialBackAnswer(msgspec.Struct, frozen=True):
    results: Annotated[tuple[Dialled, ...], msgspec.Meta(max_length=MAX_ADDRESSES)]


DIAL = Method("pxd.reach.dial", DialBack, DialBackAnswer)


async def probe(identity: Identity, address: Address) -> Outcome:
    """Connect afresh and see whether the node of `address` answers; takes `PROBE_TIMEOUT` at most.

    The connection is closed before the key proof, so it never becomes part of a session.
    """
    with trio.move_on_after(PROBE_TIMEOUT):
        try:
            stream = await trio.open_tcp_stream(address.host, address.port)
        except OSError as error:
            return _why(error)
        try:
            await identity.secure_outbound(stream, address.peer)
        except PeerIDMismatchesPubkey:
            return "other"
        except Exception:
            log.debug("what answers at %s is no pxd node", address, exc_info=True)
            return "other"
        finally:
            await trio.aclose_forcefully(stream)
        return "ok"
    return "timeout"


async def probe_port(host: str, port: int) -> Outcome:
    """Whether anything accepts TCP connections there; takes `PROBE_TIMEOUT` at most."""
    with trio.move_on_after(PROBE_TIMEOUT):
        try:
            stream = await trio.open_tcp_stream(host, port)
        except OSError as error:
            return _why(error)
        await trio.aclose_forcefully(stream)
        return "ok"
    return "timeout"


class Reach:
    """Serves `DIAL`. `addresses_of(peer)` is what the peer's record says, as this node knows it;
    `host_of(peer)` the IP address at the other end of the connection with it."""

    def __init__(
        self,
        identity: Identity,
        addresses_of: Callable[[str], Sequence[str]],
        host_of: Callable[[str], str | None],
    ) -> None:
        self._identity = identity
        self._addresses_of = addresses_of
        self._host_of = host_of
        self._running = 0
        self._allowance: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def serve(self, peer: str, request: DialBack) -> DialBackAnswer:
        """Raises `CallFailed`: "too-often", "busy", or "no-address" where no record is known."""
        told = direct(self._addresses_of(peer))
        addresses = parse_peer_addresses(peer, told)[:MAX_ADDRESSES]
        if not addresses:
            raise CallFailed("no-address", "the record known here names no address")
        if self._running >= AT_ONCE:
            raise CallFailed("busy", "this node dials back for others; ask again in some seconds")
        self._spend(peer)
        self._running += 1
        try:
            return await self._dial(addresses, request.data_port, self._may_loop(peer))
        finally:
            self._running -= 1

    async def _dial(
        self, addresses: list[Address], data_port: int, loopback: bool
    ) -> DialBackAnswer:
        found: dict[Address, dict[str, Outcome]] = {address: {} for address in addresses}
        here = local_addresses()

        def note(address: Address, port: str, outcome: Outcome) -> None:
            # Of several ways to a link-local address one is enough.
            if found[address].get(port) != "ok":
                found[address][port] = outcome

        async def listen(address: Address, way: Address) -> None:
            note(address, "listen", await probe(self._identity, way))

        async def data(address: Address, way: Address) -> None:
            note(address, "data", await probe_port(way.host, data_port))

        async with trio.open_nursery() as nursery:
            for address in found:
                if not may_dial(address.host, loopback=loopback):
                    continue
                for way in routes([address], here):
                    nursery.start_soon(listen, address, way)
                    if data_port:
                        nursery.start_soon(data, address, way)
        return DialBackAnswer(
            tuple(
                Dialled(str(address), got.get("listen", "skipped"), got.get("data", "skipped"))
                for address, got in found.items()
            )
        )

    def _may_loop(self, peer: str) -> bool:
        host = self._host_of(peer)
        return host is not None and _is_loopback(host)

    def _spend(self, peer: str) -> None:
        """Each peer may ask `BURST` times at once, and once more every `REFILL_SECONDS`."""
        now = trio.current_time()
        left, at = self._allowance.pop(peer, (float(BURST), now))
        left = min(float(BURST), left + (now - at) / REFILL_SECONDS)
        allowed = left >= 1
        self._allowance[peer] = (left - 1 if allowed else left, now)
        if len(self._allowance) > REQUESTERS:
            self._allowance.popitem(last=False)
        if not allowed:
            wait = math.ceil((1 - left) * REFILL_SECONDS)
            raise CallFailed("too-often", f"ask again in {wait} s")


def direct(addresses: Sequence[str]) -> tuple[str, ...]:
    """Without those that lead through a relay, which is another node's host and port."""
    return tuple(address for address in addresses if "/p2p-circuit/" not in address)


def may_dial(host: str, *, loopback: bool) -> bool:
    """Whether `host` can be somebody else's address: no multicast, and loopback only if allowed.

    Names are resolved by nobody here: they could point to anything by the time of the dial.
    """
    try:
        ip = ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return False
    if ip.is_multicast or ip.is_unspecified or host == "255.255.255.255":
        return False
    return loopback or not _is_loopback(host)


def _is_loopback(host: str) -> bool:
    try:
        ip = ipaddress.ip_address(host.strip("[]").partition("%")[0])
    except ValueError:
        return False
    mapped = getattr(ip, "ipv4_mapped", None)
    return (mapped or ip).is_loopback


def _why(error: OSError) -> Outcome:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ConnectionRefusedError):
            return "refused"
        if isinstance(cause, TimeoutError):
            return "timeout"
        cause = cause.exceptions[0] if isinstance(cause, BaseExceptionGroup) else cause.__cause__
    return "unreachable"
