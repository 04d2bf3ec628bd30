"""Which nodes say that they listen where: a node at a dead one's address has replaced it."""

import re
from collections.abc import Iterable

from pxd.cluster.records import NodeRecord

# A relayed address has the relay's endpoint, which is no property of the node.
_DIRECT = re.compile(r"(/(?:ip4|ip6|dns|dns4|dns6)/[^/]+/tcp/[0-9]+)/p2p/([^/]+)")
_CROWD = 8


class Endpoints:
    """Index of listed addresses; of an address that many claim it knows the first few."""

    def __init__(self) -> None:
        self._nodes: dict[str, set[str]] = {}
        self._listed: dict[str, frozenset[str]] = {}
        self._addresses: dict[str, tuple[str, ...]] = {}

    def put(self, record: NodeRecord) -> None:
        """Take note of a new or changed record."""
        if record.addresses == self._addresses.get(record.id, ()):
            return
        self.remove(record.id)
        self._addresses[record.id] = record.addresses
        listed = self._listed[record.id] = frozenset(_endpoints(record))
        for endpoint in listed:
            nodes = self._nodes.setdefault(endpoint, set())
            if len(nodes) < _CROWD:
                nodes.add(record.id)

    def remove(self, node: str) -> None:
        self._addresses.pop(node, None)
        for endpoint in self._listed.pop(node, ()):
            nodes = self._nodes.get(endpoint, set())
            nodes.discard(node)
            if not nodes:
                self._nodes.pop(endpoint, None)

    def sharing(self, node: str) -> set[str]:
        """Other nodes with an address of this one's."""
        found: set[str] = set()
        for endpoint in self._listed.get(node, ()):
            found |= self._nodes.get(endpoint, set())
        return found - {node}


def _endpoints(record: NodeRecord) -> Iterable[str]:
    for address in record.addresses:
        match = _DIRECT.fullmatch(address)
        if match is not None and match[2] == record.id:
            yield match[1]
