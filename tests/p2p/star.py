"""A relay and members around it, on loopback: that two of them cannot reach each other is only that
neither knows an address of the other."""

from pxd.p2p import relay
from pxd.p2p.circuit import HOP
from pxd.p2p.host import Connection
from pxd.p2p.libp2p_network import Libp2pNetwork
from tests.p2p.nodes import ECHO, Nodes, Text


def link(a: Libp2pNetwork, b: Libp2pNetwork) -> Connection:
    session = a._sessions.get(b.peer_id)
    assert session
    return session.connection


class Star:
    """A relay and members that know nobody else."""

    def __init__(self, nodes: Nodes, middle: Libp2pNetwork) -> None:
        self.nodes = nodes
        self.middle = middle

    async def member(self) -> Libp2pNetwork:
        member = await self.nodes.start(self.middle)
        member.use_relays(frozenset({self.middle.peer_id}))
        return member

    async def joined(self) -> tuple[Libp2pNetwork, Libp2pNetwork]:
        """Two that are connected through the relay."""
        a, b = await self.member(), await self.member()
        assert await a.call(b.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")
        return a, b

    @property
    def circuits(self) -> int:
        served = self.middle._host.handlers[HOP].__self__  # type: ignore[attr-defined]
        assert isinstance(served, relay.Relay)
        return served._circuits
