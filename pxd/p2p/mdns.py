"""Finding members on the local network by multicast DNS, without telling anybody else.

Each node announces its peer id, its port and a short keyed digest of the peer id. Only a holder of
the cluster key can tell from the digest that the node belongs to its cluster; nobody learns the key
from it. A forged announcement leads to a connection that fails the key proof.
"""

import concurrent.futures
import hmac
import ipaddress
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import trio
import zeroconf
from zeroconf import IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange

from pxd.p2p.addresses import Address, parse_address

log = logging.getLogger("pxd.p2p")

SERVICE = "_pxd._tcp.local."
LOOKUP_TIMEOUT_MS = 3000
FOUND_QUEUE = 256
CLOSE_TRIES = 3

DUAL_STACK = sys.platform == "linux"
"""Elsewhere a socket that speaks both hears no multicast of IPv4, which is what most networks have:
there, IPv6 is used only where there is nothing else."""
ADDRESSES_PER_PEER = 16


def badge(cluster_key: bytes, peer_id: str) -> str:
    """The digest by which members recognise each other: 8 bytes of HMAC-SHA256, in hex."""
    message = b"pxd mdns badge 1" + peer_id.encode()
    return hmac.digest(cluster_key, message, "sha256")[:8].hex()


class Heard(NamedTuple):
    """An announcement, by a member or by somebody with another key, or a node's goodbye."""

    kind: Literal["member", "stranger", "gone"]
    peer: str
    addresses: tuple[Address, ...] = ()


class MulticastFailed(Exception):
    """There is no mDNS here; the message says why."""


class Mdns:
    """Runs the zeroconf library, which has threads of its own.

    `hosts` are the IP addresses to announce, `speak_at` those of the interfaces to use. `keys`
    returns the cluster keys that count, the one to announce with first; any thread asks it.
    """

    def __init__(
        self,
        peer_id: str,
        keys: Callable[[], tuple[bytes, ...]],
        port: int,
        hosts: Sequence[str],
        speak_at: Sequence[str],
    ) -> None:
        self._peer_id = peer_id
        self._keys = keys
        self._port = port
        self._hosts = hosts
        self._speak_at = speak_at

    async def run(
        self,
        hear: Callable[[Heard], None],
        *,
        task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED,
    ) -> None:
        """Announce this node and `hear` of all others. `started` once announced.

        Raises `MulticastFailed`.
        """
        send, receive = trio.open_memory_channel[Heard](FOUND_QUEUE)
        token = trio.lowlevel.current_trio_token()

        def hand_over(heard: Heard) -> None:
            try:
                token.run_sync_soon(_offer, send, heard)
            except trio.RunFinishedError:
                log.debug("heard of %s after the end", heard.peer)

        try:
            service = await trio.to_thread.run_sync(self._start, hand_over)
        except (OSError, RuntimeError, zeroconf.Error) as error:
            # A RuntimeError where an address is gone before zeroconf looked for its interface.
            raise MulticastFailed(str(error) or type(error).__name__) from error
        try:
            task_status.started()
            async for heard in receive:
                hear(heard)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(_close, service)

    def _start(self, hand_over: Callable[[Heard], None]) -> zeroconf.Zeroconf:
        """Blocks for about a second; for a worker thread."""
        service = self._open()
        try:
            service.register_service(self._info(), cooperating_responders=True)

            def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
                if state_change is ServiceStateChange.Removed:
                    hand_over(Heard("gone", name.removesuffix(f".{SERVICE}")))
                else:
                    self._look_up(service, name, hand_over)

            ServiceBrowser(service, SERVICE, handlers=[changed])
        except BaseException:
            _close(service)
            raise
        return service

    def _open(self) -> zeroconf.Zeroconf:
        versions = {ipaddress.ip_address(host).version for host in self._speak_at}
        if versions == {6}:
            version = IPVersion.V6Only
        elif 6 in versions and DUAL_STACK:
            version = IPVersion.All
        else:
            version = IPVersion.V4Only
        ignored = 6 if version is IPVersion.V4Only else 0
        return zeroconf.Zeroconf(
            interfaces=[
                host for host in self._speak_at if ipaddress.ip_address(host).version != ignored
            ],
            ip_version=version,
            use_asyncio=False,
        )

    def _info(self) -> ServiceInfo:
        return ServiceInfo(
            SERVICE,
            f"{self._peer_id}.{SERVICE}",
            port=self._port,
            parsed_addresses=list(self._hosts)[:ADDRESSES_PER_PEER],
            properties={"id": self._peer_id, "badge": badge(self._keys()[0], self._peer_id)},
            server=f"pxd-{self._peer_id[-16:]}.local.",
        )

    def _look_up(
        self, service: zeroconf.Zeroconf, name: str, hand_over: Callable[[Heard], None]
    ) -> None:
        """Runs in a thread of zeroconf; what is announced there may be anything."""
        if name == f"{self._peer_id}.{SERVICE}":
            return
        try:
            info = service.get_service_info(SERVICE, name, timeout=LOOKUP_TIMEOUT_MS)
            heard = read_announcement(info, *self._keys()) if info else None
        except Exception:
            log.debug("could not look up %s", name, exc_info=True)
            return
        if heard:
            hand_over(heard)


def read_announcement(info: ServiceInfo, *keys: bytes) -> Heard:
    """A member is who shows the badge of one of `keys`.

    Raises ValueError for an announcement that makes no sense.
    """
    peer = (info.properties.get(b"id") or b"").decode("ascii")
    shown = info.properties.get(b"badge") or b""
    member = any(hmac.compare_digest(shown, badge(key, peer).encode()) for key in keys)
    # The zone of a link-local address is the dialer's business.
    hosts = (host.partition("%")[0] for host in info.parsed_addresses(IPVersion.All))
    addresses = [str(Address(host, info.port or 0, peer)) for host in hosts][:ADDRESSES_PER_PEER]
    known = tuple(parse_address(address) for address in addresses)
    return Heard("member" if member else "stranger", peer, known)


def _close(service: zeroconf.Zeroconf) -> None:
    """Blocks. It takes a second try where this process was frozen during the first one."""
    for _ in range(CLOSE_TRIES):
        try:
            service.close()
        except (OSError, zeroconf.Error, concurrent.futures.TimeoutError) as error:
            log.debug("zeroconf would not close: %r", error)
        else:
            return
    log.warning("cannot end the search for other nodes cleanly; some threads are left behind")


def _offer(send: "trio.MemorySendChannel[Heard]", heard: Heard) -> None:
    try:
        send.send_nowait(heard)
    except trio.WouldBlock:
        log.debug("dropped an announcement of %s", heard.peer)
