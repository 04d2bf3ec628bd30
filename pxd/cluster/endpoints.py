"""Which nodes say that they listen where: a node at a dead one's address has replaced it."""

from collections.abc import Iterable

from pxd.cluster.records import NodeRecord

_HOSTS = frozenset({"ip4", "ip6", "dns", "dns4", "dns6"})
_CROWD = 8


class Endpoints:
    """Index of listed addresses; of an address that many claim it knows the first few."""

    def __init__(self) -> None:
        self._nodes: dict[str, tuple[str, ...]] = {}
        self._listed: dict[str, tuple[str, ...]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}

    def put(self, record: NodeRecord) -> None:
        """Take note of a new or changed record."""
        if record.addresses == self._addresses.get(record.id, ()):
            return
        self.remove(record.id)
        self._addresses[record.id] = record.addresses
        listed = self._listed[record.id] = tuple(dict.fromkeys(_endpoints(record)))
        for endpoint in listed:
            nodes = self._nodes.get(endpoint, ())
            self._nodes[endpoint] = (*nodes, record.id)[:_CROWD]

    def remove(self, node: str) -> None:
        self._addresses.pop(node, None)
        for endpoint in self._listed.pop(node, ()):
            nodes = tuple(other for other in self._nodes.pop(endpoint, ()) if other != node)
            if nodes:
                self._nodes[endpoint] = nodes

    def sharing(self, node: str) -> set[str]:
        """Other nodes with an address of this one's."""
        found: set[str] = set()
        for endpoint in self._listed.get(node, ()):
            found.update(self._nodes.get(endpoint, ()))
        return found - {node}


def _endpoints(record: NodeRecord) -> Iterable[str]:
    """As in /ip4/10.0.0.1/tcp/4001/p2p/ID. A relayed address has the relay's endpoint, which is no
    property of the node."""
    for address in record.addresses:
        parts = address.split("/")
        if len(parts) != 7:
            continue
        start, family, host, tcp, port, p2p, node = parts
        direct = not start and family in _HOSTS and host and (tcp, p2p) == ("tcp", "p2p")
        if direct and port.isdecimal() and port.isascii() and node == record.id:
            yield f"/{family}/{host}/tcp/{port}"
