"""This machine's addresses: which of them others can be told, and which lead where directly."""

import ipaddress
import re
import socket
from collections.abc import Iterable, Sequence
from enum import IntEnum

import msgspec
import psutil

INSIDE = re.compile(
    r"docker|br-[0-9a-f]{12}$|veth|virbr|vmnet|vmenet|vboxnet|lxcbr|lxdbr|podman|cni|flannel|cali|kube"
    r"|awdl|llw|anpi|ap\d|lo\d*$"
)
"""Networks of containers and virtual machines, which end in this machine and have the same numbers
on the next one, those that macOS keeps for itself, and loopback, which has a link-local address
there."""

TUNNEL = re.compile(r"tun|tap|wg|utun|tailscale|zt|ipsec|ppp")
_THUNDERBOLT = re.compile(r"thunderbolt|bridge0$")
_WIRELESS = re.compile(r"wl|wifi|ath\d")

GLOBAL_V6_PER_INTERFACE = 2
"""Privacy extensions give a machine a new one every day, and keep those of the last week."""


class Medium(IntEnum):
    """What an interface is, the fastest first, as far as its name tells."""

    THUNDERBOLT = 0
    WIRED = 1
    WIRELESS = 2
    TUNNEL = 3


class Local(msgspec.Struct, frozen=True):
    """An IP address of this machine, whose interface is up; `host` without a zone.

    `speed` is the interface's in Mbit/s, 0 where the system does not tell.
    """

    host: str
    interface: str
    network: str
    medium: Medium = Medium.WIRED
    speed: int = 0

    @property
    def zoned(self) -> str:
        """The address as the socket module names it."""
        return f"{self.host}%{self.interface}" if self.needs_zone else self.host

    @property
    def needs_zone(self) -> bool:
        ip = ipaddress.ip_address(self.host)
        return ip.version == 6 and ip.is_link_local

    @property
    def inside(self) -> bool:
        """Whether it belongs to a network that ends in this machine."""
        return bool(INSIDE.match(self.interface))

    def reaches(self, host: str) -> bool:
        """Whether the IP address `host` lies in this interface's subnet."""
        ip = ipaddress.ip_address(host)
        network = ipaddress.ip_network(self.network)
        return ip.version == network.version and ip in network


def local_addresses() -> tuple[Local, ...]:
    """All of interfaces that are up, loopback included. Takes a fraction of a millisecond."""
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name in stats and not stats[name].isup:
            continue
        speed = stats[name].speed if name in stats else 0
        for address in addresses:
            if address.family in (socket.AF_INET, socket.AF_INET6):
                host = address.address.partition("%")[0]
                found.append(
                    Local(host, name, _network(host, address.netmask), _medium(name), speed)
                )
    return tuple(found)


def reachable_hosts(listening: Iterable[str], among: Sequence[Local]) -> list[str]:
    """IP addresses, without zones, to advertise for sockets bound to the IP addresses `listening`.

    A wildcard stands for every address `among` those of its family that others may reach: not
    those of networks inside this machine. The likely come first. Loopback is named only when a
    socket is bound to it or when there is nothing else.
    """
    named, versions = [], []
    for text in listening:
        bound = ipaddress.ip_address(text.partition("%")[0])
        if bound.is_unspecified:
            versions.append(bound.version)
        else:
            named.append(str(bound))
    useful = [local for local in among if _version(local) in versions and _is_reachable(local)]
    # In the order of interfaces where all else is equal.
    hosts = [local.host for local in sorted(_few_global(useful), key=_likelihood)]
    if versions and not hosts:
        hosts = ["127.0.0.1" if 4 in versions else "::1"]
    return list(dict.fromkeys(named + hosts))


def _few_global(locals_: Sequence[Local]) -> list[Local]:
    counts: dict[str, int] = {}
    kept = []
    for local in locals_:
        if _version(local) == 6 and not ipaddress.ip_address(local.host).is_link_local:
            counts[local.interface] = counts.get(local.interface, 0) + 1
            if counts[local.interface] > GLOBAL_V6_PER_INTERFACE:
                continue
        kept.append(local)
    return kept


def _likelihood(local: Local) -> tuple[bool, bool, int]:
    ip = ipaddress.ip_address(local.host)
    return local.medium is Medium.TUNNEL, ip.is_link_local, ip.version


def _is_reachable(local: Local) -> bool:
    ip = ipaddress.ip_address(local.host)
    if ip.is_loopback or ip.is_unspecified or local.inside:
        return False
    # macOS gives every tunnel a link-local address that nobody else can use.
    return not (ip.is_link_local and local.medium is Medium.TUNNEL)


def _version(local: Local) -> int:
    return ipaddress.ip_address(local.host).version


def _network(host: str, netmask: str | None) -> str:
    ip = ipaddress.ip_address(host)
    prefix: int = ip.max_prefixlen
    if netmask is not None:
        # psutil writes those of IPv6 as addresses, too, with a zone on some systems.
        prefix = int(ipaddress.ip_address(netmask.partition("%")[0])).bit_count()
    return str(ipaddress.ip_network(f"{host}/{prefix}", strict=False))


def _medium(name: str) -> Medium:
    if _THUNDERBOLT.match(name):
        return Medium.THUNDERBOLT
    if _WIRELESS.match(name):
        return Medium.WIRELESS
    return Medium.TUNNEL if TUNNEL.match(name) else Medium.WIRED
