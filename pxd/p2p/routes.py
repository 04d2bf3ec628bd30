"""In which order a peer's addresses are tried from this machine, and through which interfaces."""

import ipaddress
from collections.abc import Iterable, Sequence

from pxd.p2p.addresses import Address
from pxd.p2p.interfaces import Local, Medium

ZONES = 4
"""Interfaces on which a link-local IPv6 address is looked for."""

ROUTES = 24

_Rank = tuple[int, int, int]
_ELSEWHERE: _Rank = (Medium.WIRELESS + 1, 0, 0)
_ASTRAY: _Rank = (Medium.TUNNEL + 1, 0, 0)


def routes(addresses: Iterable[Address], among: Sequence[Local]) -> tuple[Address, ...]:
    """`addresses` as they can be dialled from a machine with the addresses `among`; pure.

    Those in a subnet of this machine come first, by the fastest interface, then those beyond a
    router. A link-local IPv6 address means nothing without a zone, and the zone of another machine
    means nothing here: it is tried on each interface that has such an address itself. Equals stay
    in their order, so that what worked before is tried first. At most `ROUTES`.
    """
    ranked: list[tuple[_Rank, Address]] = []
    for address in addresses:
        ranked += _ways(address, among)
    ranked.sort(key=lambda item: item[0])
    return tuple(address for _, address in ranked[:ROUTES])


def nearness(host: str, among: Sequence[Local]) -> tuple[int, int] | None:
    """How good the way to the IP address `host`, with its zone, is: less is better. None for what
    is no IP address."""
    plain, _, zone = host.partition("%")
    try:
        ip = ipaddress.ip_address(plain)
    except ValueError:
        return None
    if zone:
        ranks = [_rank(local, 0) for local in among if local.interface == zone]
    else:
        ranks = [_rank(local, 0) for local in among if local.reaches(plain)]
    medium, speed, _ = min(ranks, default=_ASTRAY if ip.is_link_local else _ELSEWHERE)
    return medium, speed


def _ways(address: Address, among: Sequence[Local]) -> list[tuple[_Rank, Address]]:
    try:
        ip = ipaddress.ip_address(address.host)
    except ValueError:
        # A name, which a person gave.
        return [(_ELSEWHERE, address)]
    if ip.version == 6 and ip.is_link_local:
        zones = sorted({(_rank(local, 1), local.interface) for local in among if _is_way(local)})
        return [
            (rank, address._replace(host=f"{address.host}%{interface}"))
            for rank, interface in zones[:ZONES]
        ]
    direct = [_rank(local, 0) for local in among if local.reaches(address.host)]
    if direct:
        return [(min(direct), address)]
    return [(_ASTRAY if ip.is_link_local else _ELSEWHERE, address)]


def _rank(local: Local, wait: int) -> _Rank:
    return local.medium, -local.speed, wait


def _is_way(local: Local) -> bool:
    return local.needs_zone and local.medium is not Medium.TUNNEL and not local.inside
