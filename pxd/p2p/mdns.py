"""Finding members on the local network by multicast DNS, without telling anybody else.

Each node announces its peer id, its port and a short keyed digest of the peer id. Only a holder of
the cluster key can tell from the digest that the node belongs to its cluster; nobody learns the key
from it. A forged announcement leads to a connection that fails the key proof.
"""

import hmac
import ipaddress
import logging
from collections.abc import Callable, Sequence

import trio
import zeroconf
from zeroconf import InterfaceChoice, IPVersion, ServiceBrowser, ServiceInfo, ServiceStateChange

from pxd.p2p.addresses import Address, parse_address

log = logging.getLogger("pxd.p2p")

SERVICE = "_pxd._tcp.local."
LOOKUP_TIMEOUT_MS = 3000
FOUND_QUEUE = 256
ADDRESSES_PER_PEER = 8


def badge(cluster_key: bytes, peer_id: str) -> str:
    """The digest by which members recognise each other: 8 bytes of HMAC-SHA256, in hex."""
    message = b"pxd mdns badge 1" + peer_id.encode()
    return hmac.digest(cluster_key, message, "sha256")[:8].hex()


Found = Callable[[str, tuple[Address, ...]], None]


class Mdns:
    """Runs the zeroconf library, which has threads of its own. `hosts` are IP addresses.

    `keys` returns the cluster keys that count, the one to announce with first; any thread asks it.
    """

    def __init__(
        self,
        peer_id: str,
        keys: Callable[[], tuple[bytes, ...]],
        port: int,
        hosts: Sequence[str],
    ) -> None:
        self._peer_id = peer_id
        self._keys = keys
        self._port = port
        self._hosts = hosts

    async def run(
        self, found: Found, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED
    ) -> None:
        """Announce this node and call `found(peer, addresses)` for every other member.

        `started` once announced. Returns, with a warning in the log, where multicast does not work.
        """
        send, receive = trio.open_memory_channel[tuple[str, tuple[Address, ...]]](FOUND_QUEUE)
        token = trio.lowlevel.current_trio_token()

        def hand_over(peer: str, addresses: tuple[Address, ...]) -> None:
            try:
                token.run_sync_soon(_offer, send, (peer, addresses))
            except trio.RunFinishedError:
                log.debug("found %s after the end", peer)

        try:
            service = await trio.to_thread.run_sync(self._start, hand_over)
        except (OSError, zeroconf.Error) as error:
            log.warning(
                "cannot look for other nodes on the local network (%s); "
                "join machines with `pxd start --join TICKET` instead",
                error,
            )
            task_status.started()
            return
        try:
            task_status.started()
            async for peer, addresses in receive:
                found(peer, addresses)
        finally:
            with trio.CancelScope(shield=True):
                await trio.to_thread.run_sync(service.close)

    def _start(self, hand_over: Found) -> zeroconf.Zeroconf:
        """Blocks for about a second; for a worker thread."""
        service = self._open()
        try:
            service.register_service(self._info(), cooperating_responders=True)

            def changed(name: str, state_change: ServiceStateChange, **_: object) -> None:
                if state_change is not ServiceStateChange.Removed:
                    self._look_up(service, name, hand_over)

            ServiceBrowser(service, SERVICE, handlers=[changed])
        except BaseException:
            service.close()
            raise
        return service

    def _open(self) -> zeroconf.Zeroconf:
        parsed = [ipaddress.ip_address(host) for host in self._hosts]
        if all(host.is_loopback for host in parsed):
            return zeroconf.Zeroconf(interfaces=list(self._hosts), use_asyncio=False)
        has_ipv6 = any(host.version == 6 for host in parsed)
        return zeroconf.Zeroconf(
            interfaces=InterfaceChoice.All,
            ip_version=IPVersion.All if has_ipv6 else IPVersion.V4Only,
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

    def _look_up(self, service: zeroconf.Zeroconf, name: str, hand_over: Found) -> None:
        """Runs in a thread of zeroconf; what is announced there may be anything."""
        if name == f"{self._peer_id}.{SERVICE}":
            return
        try:
            info = service.get_service_info(SERVICE, name, timeout=LOOKUP_TIMEOUT_MS)
            member = read_announcement(info, *self._keys()) if info else None
        except Exception:
            log.debug("could not look up %s", name, exc_info=True)
            return
        if member:
            hand_over(*member)


def read_announcement(info: ServiceInfo, *keys: bytes) -> tuple[str, tuple[Address, ...]] | None:
    """Peer id and addresses, if `info` was announced by a holder of one of `keys`.

    Raises ValueError for an announcement that makes no sense.
    """
    peer = (info.properties.get(b"id") or b"").decode("ascii")
    shown = info.properties.get(b"badge") or b""
    if not any(hmac.compare_digest(shown, badge(key, peer).encode()) for key in keys):
        return None
    hosts = info.parsed_addresses(IPVersion.All)[:ADDRESSES_PER_PEER]
    addresses = (str(Address(host, info.port or 0, peer)) for host in hosts)
    return peer, tuple(parse_address(address) for address in addresses)


def _offer(
    send: "trio.MemorySendChannel[tuple[str, tuple[Address, ...]]]",
    item: tuple[str, tuple[Address, ...]],
) -> None:
    try:
        send.send_nowait(item)
    except trio.WouldBlock:
        log.debug("dropped an announcement of %s", item[0])
