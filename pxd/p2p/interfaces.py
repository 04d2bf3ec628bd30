"""Which of this machine's addresses others can be told, given the address it listens on."""

import ipaddress
import socket

import psutil


def reachable_hosts(listening: str) -> list[str]:
    """IP addresses to advertise for a socket bound to the IP address `listening`.

    A wildcard stands for every interface that is up; loopback is named only when the socket is
    bound to it or when there is nothing else.
    """
    bound = ipaddress.ip_address(listening.split("%")[0])
    if not bound.is_unspecified:
        return [str(bound)]
    family = socket.AF_INET if bound.version == 4 else socket.AF_INET6
    up = psutil.net_if_stats()
    hosts = []
    for interface, addresses in psutil.net_if_addrs().items():
        if interface in up and not up[interface].isup:
            continue
        for address in addresses:
            if address.family == family and _is_routable(address.address):
                hosts.append(address.address)
    return hosts or ["127.0.0.1" if bound.version == 4 else "::1"]


def _is_routable(address: str) -> bool:
    # A link-local IPv6 address means nothing without the zone, which differs on every machine.
    ip = ipaddress.ip_address(address.split("%")[0])
    return not (ip.is_loopback or ip.is_unspecified or (ip.version == 6 and ip.is_link_local))
