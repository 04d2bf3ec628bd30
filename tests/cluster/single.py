"""One membership alone: what it is told, and what it then says and does."""

from collections.abc import Callable

import msgspec

from pxd.cluster.config import MembershipConfig
from pxd.cluster.members import MemberTable
from pxd.cluster.membership import Membership
from pxd.cluster.messages import Ack, Claim, Delta, GossipMessage, Nack, News, Ping, PingRequest
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import goodbye
from tests.signers import FakeSigner, signed

CONFIG = MembershipConfig()


def record(node: str, incarnation: int = 1, version: int = 0, **more: object) -> NodeRecord:
    return NodeRecord(id=node, name=node, incarnation=incarnation, version=version, **more)  # type: ignore[arg-type]


def membership_of(own: NodeRecord, **config: float) -> Membership:
    """Running, and alone so far."""
    settings = msgspec.structs.replace(CONFIG, **config)
    membership = Membership(own, settings, 1, FakeSigner(own.id))
    membership.start(0.0)
    return membership


def member(*others: NodeRecord, node: str = "me", **config: float) -> Membership:
    """A running membership that knows `others`, with nothing left to send or to tell."""
    membership = membership_of(record(node), **config)
    for start in range(0, len(others), 200):
        # One alone may not tell of more.
        teller = f"teller{start}" if start else "teller"
        membership.receive(0.0, teller, news(*others[start : start + 200]))
    membership.tick(0.0)
    membership.take_outbox()
    membership.take_events()
    return membership


def table_of(own: NodeRecord, **config: float) -> MemberTable:
    return MemberTable(own, signed(own), msgspec.structs.replace(CONFIG, **config))


def news(*records: NodeRecord) -> Delta:
    """As their nodes signed them."""
    return Delta(news=News(records=tuple(signed(record) for record in records)))


def left(node: str, incarnation: int = 1, by: str | None = None) -> Claim:
    """A goodbye as the node itself signed it, passed on by `by`."""
    proof = goodbye(node, incarnation, FakeSigner(node))
    return Claim(node, "left", incarnation, by or node, proof)


def kinds(membership: Membership) -> list[tuple[str, str]]:
    return [(event.kind, event.record.id) for event in membership.take_events()]


def sent(membership: Membership, kind: type[GossipMessage]) -> list[tuple[str, GossipMessage]]:
    return [(peer, m) for peer, m in membership.take_outbox() if isinstance(m, kind)]


def tell(membership: Membership, *claims: Claim, now: float = 0.0, by: str = "teller") -> None:
    membership.receive(now, by, Delta(news=News(claims=claims)))


def run(membership: Membership, until: float) -> list[tuple[float, str, GossipMessage]]:
    """Let the time pass; returns what it sends, and when."""
    said = []
    while membership.next_wakeup <= until:
        now = membership.next_wakeup
        membership.tick(now)
        said += [(now, peer, message) for peer, message in membership.take_outbox()]
    return said


def run_answered(
    membership: Membership, until: float, answers: Callable[[str], bool] = lambda _: True
) -> list[tuple[float, str, GossipMessage]]:
    """As `run`, among members of whom those that do so answer every ping at once."""
    said = []
    while membership.next_wakeup <= until:
        now = membership.next_wakeup
        membership.tick(now)
        for peer, message in membership.take_outbox():
            said.append((now, peer, message))
            if not answers(peer):
                continue
            if isinstance(message, PingRequest):
                membership.receive(now, peer, Nack(seq=message.seq, news=News()))
            if isinstance(message, Ping):
                membership.receive(now, peer, Ack(seq=message.seq, news=News()))
    return said
