"""Where a node can be dialled, as a multiaddr: ``/ip4/192.0.2.7/tcp/8471/p2p/12D3KooW...``."""

import ipaddress
import re
import socket
from typing import Any, NamedTuple

_PEER_ID = re.compile(r"[1-9A-HJ-NP-Za-km-z]{32,64}")
_LABEL = r"[A-Za-z0-9_](?:[A-Za-z0-9_-]{0,61}[A-Za-z0-9_])?"
_HOST_NAME = re.compile(rf"(?=.{{1,253}}\Z){_LABEL}(?:\.{_LABEL})*")
"""Names that any resolver takes: Python's raises more than OSError for a label that is too long."""

_PORT = re.compile(r"[1-9][0-9]{0,4}")
_HOST_PROTOCOLS = ("ip4", "ip6", "dns", "dns4", "dns6")


class Address(NamedTuple):
    """A TCP endpoint and the peer id that must answer there."""

    host: str
    port: int
    peer: str

    @property
    def is_name(self) -> bool:
        """It has to be looked up before it can be dialled."""
        try:
            ipaddress.ip_address(self.host)
        except ValueError:
            return True
        return False

    def without_zone(self) -> "Address":
        """As it may be kept and told: a zone counts on this machine alone, and only for now."""
        return self._replace(host=self.host.partition("%")[0])

    def __str__(self) -> str:
        protocol = "dns" if self.is_name else f"ip{ipaddress.ip_address(self.host).version}"
        return f"/{protocol}/{self.host}/tcp/{self.port}/p2p/{self.peer}"


def for_tickets(addresses: tuple[str, ...]) -> tuple[str, ...]:
    """Those worth typing: link-local ones of IPv6, which are found by multicast anyway, only where
    there is nothing else."""
    short = tuple(address for address in addresses if not address.startswith("/ip6/fe80:"))
    return short or addresses


def host_in(name: tuple[Any, ...]) -> str:
    """The IP address that `getpeername` and `getsockname` return, with its zone if it has one."""
    host, scope = str(name[0]), name[3] if len(name) == 4 else 0
    if not scope:
        return host
    try:
        return f"{host.partition('%')[0]}%{socket.if_indextoname(scope)}"
    except OSError:
        # The interface is gone.
        return host


def parse_address(text: str) -> Address:
    """Raises ValueError for anything but ``/ip4|ip6|dns.../HOST/tcp/PORT/p2p/PEER``."""
    parts = text.split("/")
    if len(parts) != 7 or parts[0] or parts[3] != "tcp" or parts[5] != "p2p":
        raise ValueError(f"{text!r} is not a multiaddr like /ip4/192.0.2.7/tcp/8471/p2p/PEER")
    _, protocol, host, _, port, _, peer = parts
    if protocol not in _HOST_PROTOCOLS or not _is_host(protocol, host):
        raise ValueError(f"{text!r} has no usable host")
    if not _PORT.fullmatch(port) or int(port) > 65535:
        raise ValueError(f"{text!r} has no usable port")
    if not _PEER_ID.fullmatch(peer):
        raise ValueError(f"{text!r} ends in something that is not a peer id")
    return Address(host, int(port), peer)


def parse_peer_addresses(
    peer: str, texts: tuple[str, ...], *, names: bool = False
) -> list[Address]:
    """Those of `texts` that are addresses of `peer`; the rest came from a confused peer.

    Host names only where `names` are wanted: nobody's word shall make this node look names up.
    """
    found = []
    for text in texts:
        try:
            address = parse_address(text)
        except ValueError:
            continue
        if address.peer == peer and (names or not address.is_name):
            found.append(address)
    return found


def _is_host(protocol: str, host: str) -> bool:
    if protocol.startswith("dns"):
        return bool(_HOST_NAME.fullmatch(host))
    try:
        # A zone is good on one machine only: `ip_address` takes it, nobody else shall.
        return "%" not in host and ipaddress.ip_address(host).version == int(protocol[2:])
    except ValueError:
        return False
