"""What the checks judge by: the cluster as this node sees it at one moment, without any waiting."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Protocol, runtime_checkable

import msgspec

from pxd.cluster.members import Member
from pxd.cluster.messages import MemberState
from pxd.cluster.records import NodeRecord
from pxd.doctor.interfaces import Interface
from pxd.p2p.addresses import parse_peer_addresses
from pxd.p2p.network import Network
from pxd.p2p.reach import direct
from pxd.p2p.refusals import Refusal
from pxd.p2p.secure import Identity
from pxd.serving.status import ClusterStatus
from pxd.settings import Settings


class DoctorNetwork(Network, Protocol):
    """What the doctor needs of the network beyond what everybody does."""

    identity: Identity

    def refusals(self) -> tuple[Refusal, ...]: ...
    def ports(self) -> tuple[int, int]: ...
    def host_of(self, peer: str) -> str | None: ...


class HeardPeer(Protocol):
    """A node whose announcement came by multicast `age_s` seconds ago."""

    @property
    def peer(self) -> str: ...
    @property
    def addresses(self) -> tuple[str, ...]: ...
    @property
    def age_s(self) -> float: ...


class Discovered(Protocol):
    """What discovery knows. `mdns` is empty while it runs, else why not; `foreign` are nodes of
    clusters with another key."""

    @property
    def mdns(self) -> str: ...
    @property
    def heard(self) -> Sequence[HeardPeer]: ...
    @property
    def foreign(self) -> Sequence[HeardPeer]: ...


@runtime_checkable
class Discovering(Protocol):
    """A network that tells what its discovery has heard."""

    def discovery(self) -> Discovered: ...


@runtime_checkable
class Relaying(Protocol):
    """A network that can reach peers through others; tells which it reaches only so."""

    def relayed(self) -> frozenset[str]: ...


def hosts_in(peer: str, addresses: tuple[str, ...]) -> tuple[str, ...]:
    """The hosts at which `peer` itself can be found; a relay's is not one."""
    return tuple(address.host for address in parse_peer_addresses(peer, direct(addresses)))


class Peer(msgspec.Struct, frozen=True):
    """Another member. `name` is unique. `host` is the other end of the connection with it, None
    without one; `rtt` in seconds, `bandwidth` in GB/s, None where not measured; `here`: it runs on
    this very machine."""

    id: str
    name: str
    record: NodeRecord
    state: MemberState
    since: float
    host: str | None = None
    rtt: float | None = None
    bandwidth: float | None = None
    relayed: bool = False
    here: bool = False

    @property
    def connected(self) -> bool:
        return self.host is not None

    @property
    def live(self) -> bool:
        return self.state in ("alive", "suspect")

    @property
    def hosts(self) -> tuple[str, ...]:
        """The hosts of the addresses in its record."""
        return hosts_in(self.id, self.record.addresses)


class Facts(msgspec.Struct, frozen=True, kw_only=True):
    """`peers` are all other members, `now` is Unix time, `ports` the listen and the data port."""

    own: NodeRecord
    settings: Settings
    status: ClusterStatus
    peers: tuple[Peer, ...]
    interfaces: tuple[Interface, ...]
    ports: tuple[int, int]
    refusals: tuple[Refusal, ...] = ()
    discovered: Discovered | None = None
    now: float = 0.0

    @property
    def live(self) -> tuple[Peer, ...]:
        return tuple(peer for peer in self.peers if peer.live)

    @property
    def connected(self) -> tuple[Peer, ...]:
        return tuple(peer for peer in self.peers if peer.live and peer.connected)

    @property
    def own_hosts(self) -> tuple[str, ...]:
        return hosts_in(self.own.id, self.own.addresses)

    def name(self, peer: str) -> str:
        """A member by its name, a stranger by the end of its peer id."""
        if peer == self.own.id:
            return "this node"
        return next((each.name for each in self.peers if each.id == peer), f"~{peer[-5:]}")


def gather(
    network: DoctorNetwork,
    members: Mapping[str, Member],
    status: ClusterStatus,
    settings: Settings,
    interfaces: tuple[Interface, ...],
    *,
    now: float,
    clock: float,
) -> Facts:
    """`now` is Unix time, `clock` the time that members' `since` is told in."""
    own = members[network.peer_id].record
    names = Counter(member.record.name for member in members.values())
    own_hosts = set(hosts_in(own.id, network.addresses()))
    relayed = network.relayed() if isinstance(network, Relaying) else frozenset[str]()
    bandwidths = {link.peer: link.bandwidth for link in own.links if link.bandwidth > 0}
    peers = []
    for id_, member in members.items():
        if id_ == network.peer_id:
            continue
        name, host = member.record.name, network.host_of(id_)
        peers.append(
            Peer(
                id=id_,
                name=name if names[name] == 1 else f"{name}~{id_[-5:]}",
                record=member.record,
                state=member.state,
                since=clock - member.since,
                host=host,
                rtt=member.rtt,
                bandwidth=bandwidths.get(id_),
                relayed=id_ in relayed,
                here=host is not None and (host in own_hosts or host.startswith("127.")),
            )
        )
    return Facts(
        own=own,
        settings=settings,
        status=status,
        peers=tuple(sorted(peers, key=lambda peer: (peer.name, peer.id))),
        interfaces=interfaces,
        ports=network.ports(),
        refusals=network.refusals(),
        discovered=network.discovery() if isinstance(network, Discovering) else None,
        now=now,
    )
