"""What members say to each other; every message fits `MAX_MESSAGE`. A receiver trusts the peer id
of the authenticated connection, and signatures."""

from typing import Annotated, Literal

import msgspec

from pxd.wire import Count, Identifier

MAX_MESSAGE = 64 << 10
"""Bytes; senders split what would be larger, receivers refuse it undecoded."""
MAX_RECORD = 32 << 10
"""Bytes of one encoded record."""
LAST_COUNT = (1 << 48) - 1
"""The greatest incarnation and version."""

MemberState = Literal["alive", "suspect", "dead", "left"]
ClaimState = Literal["suspect", "dead", "left"]

Proof = Annotated[bytes, msgspec.Meta(max_length=128)]


class SignedRecord(msgspec.Struct, frozen=True, array_like=True):
    """A node's record as the node itself encoded and signed it; see `pxd.cluster.signing`.

    It is passed on as it came, fields that only later versions know included. The order stands
    outside so that old news need not be decoded.
    """

    node: Identifier
    incarnation: Count
    version: Count
    content: Annotated[bytes, msgspec.Meta(max_length=MAX_RECORD)]
    signature: Annotated[bytes, msgspec.Meta(min_length=64, max_length=64)]

    @property
    def order(self) -> tuple[int, int]:
        return self.incarnation, self.version


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """`by` says that `node` is in `state` as of that incarnation.

    Void as soon as the node shows a greater incarnation, and before it has shown that one. `left`
    counts only with a `proof` by the node itself; on a claim of death it shows the node that it
    has had that life, should it have forgotten.
    """

    node: Identifier
    state: ClaimState
    incarnation: Count
    by: Identifier
    proof: Proof = b""


class News(msgspec.Struct, frozen=True, array_like=True):
    """Rumours: the records and claims that ride on every message."""

    records: Annotated[tuple[SignedRecord, ...], msgspec.Meta(max_length=4096)] = ()
    claims: Annotated[tuple[Claim, ...], msgspec.Meta(max_length=4096)] = ()


class Ping(msgspec.Struct, frozen=True, tag="ping", kw_only=True):
    """Asks for an `Ack` with the same `seq`."""

    seq: Count
    news: News


class Ack(msgspec.Struct, frozen=True, tag="ack", kw_only=True):
    seq: Count
    news: News


class PingRequest(msgspec.Struct, frozen=True, tag="ping-request", kw_only=True):
    """Asks the receiver to ping `target` and to pass its ack on under `seq`."""

    seq: Count
    target: Identifier
    news: News


class Nack(msgspec.Struct, frozen=True, tag="nack", kw_only=True):
    """The target of ping request `seq` has not answered the helper in time: the helper is well,
    and so is the way to it."""

    seq: Count
    news: News


class DigestEntry(msgspec.Struct, frozen=True, array_like=True):
    """What the sender holds of a node: the record's order, and its state as of `incarnation`.

    `proof` as in `Claim`.
    """

    node: Identifier
    record: tuple[Count, Count]
    state: MemberState
    incarnation: Count
    proof: Proof = b""


class Digest(msgspec.Struct, frozen=True, tag="digest", kw_only=True):
    """All that the sender holds of nodes with `after` < id <= `until`; asks for a `Delta` back.

    None stands for no bound. The bounds let a receiver tell "not in this part" from "not known".
    """

    after: Identifier | None
    until: Identifier | None
    entries: Annotated[tuple[DigestEntry, ...], msgspec.Meta(max_length=4096)]


class Part(msgspec.Struct, frozen=True, array_like=True):
    """`digest` stands for all that the sender holds of the living up to id `until`, from where the
    part before ends."""

    until: Identifier | None
    digest: Annotated[bytes, msgspec.Meta(min_length=8, max_length=8)]


class Summary(msgspec.Struct, frozen=True, tag="summary", kw_only=True):
    """Asks for a `Digest` of every part in which the receiver holds something else, and for nothing
    where both agree. Bounds grow, the last one is None; no other summary is looked at."""

    parts: Annotated[tuple[Part, ...], msgspec.Meta(min_length=1, max_length=256)]


class Delta(msgspec.Struct, frozen=True, tag="delta", kw_only=True):
    """News on its own: plain gossip, or an `answer` to a digest or a delta, which may want records
    back. A crowd does not pass answers on: everybody will ask for themselves."""

    news: News
    wants: Annotated[tuple[Identifier, ...], msgspec.Meta(max_length=4096)] = ()
    answer: bool = False


GossipMessage = Ping | Ack | PingRequest | Nack | Summary | Digest | Delta
