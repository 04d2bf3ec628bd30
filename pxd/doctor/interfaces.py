"""This machine's network interfaces, as far as the doctor cares: IPv4, up, not loopback."""

import ipaddress
import socket

import msgspec
import psutil

from pxd.p2p.interfaces import INSIDE, TUNNEL


class Interface(msgspec.Struct, frozen=True):
    """An IPv4 address of this machine. `inner`: a tunnel, or a network inside this machine."""

    name: str
    address: str
    network: str
    multicast: bool
    inner: bool

    def holds(self, host: str) -> bool:
        """Whether the IP address `host` lies in this interface's subnet."""
        try:
            return ipaddress.ip_address(host) in ipaddress.ip_network(self.network)
        except ValueError:
            return False


def interfaces() -> tuple[Interface, ...]:
    stats = psutil.net_if_stats()
    found = []
    for name, addresses in psutil.net_if_addrs().items():
        if name not in stats or not stats[name].isup:
            continue
        flags = stats[name].flags.split(",")
        for address in addresses:
            if address.family != socket.AF_INET or address.address.startswith("127."):
                continue
            network = ipaddress.ip_network(
                f"{address.address}/{address.netmask or 32}", strict=False
            )
            inner = bool(INSIDE.match(name) or TUNNEL.match(name)) or "pointopoint" in flags
            found.append(
                Interface(name, address.address, str(network), "multicast" in flags, inner)
            )
    return tuple(found)


def interface_of(host: str, among: tuple[Interface, ...]) -> str:
    """The name of the interface with the address `host`; empty where there is none."""
    return next((each.name for each in among if each.address == host), "")
