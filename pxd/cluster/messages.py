"""What members say to each other. Every message fits `MAX_MESSAGE` unless one record alone is
larger; a receiver trusts nothing but the peer id of the authenticated connection."""

from typing import Annotated, Literal

import msgspec

from pxd.cluster.records import NodeRecord
from pxd.wire import Count, Identifier

MAX_MESSAGE = 64 << 10
"""Bytes; senders split what would be larger."""

MemberState = Literal["alive", "suspect", "dead", "left"]
ClaimState = Literal["suspect", "dead", "left"]


class Claim(msgspec.Struct, frozen=True, array_like=True):
    """`by` says that `node` is in `state` as of that incarnation.

    Void as soon as the node shows a greater incarnation.
    """

    node: Identifier
    state: ClaimState
    incarnation: Count
    by: Identifier


class News(msgspec.Struct, frozen=True, array_like=True):
    """Rumours: the records and claims that ride on every message."""

    records: Annotated[tuple[NodeRecord, ...], msgspec.Meta(max_length=4096)] = ()
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


class DigestEntry(msgspec.Struct, frozen=True, array_like=True):
    """What the sender holds of a node: the record's order, and its state as of `incarnation`."""

    node: Identifier
    record: tuple[Count, Count]
    state: MemberState
    incarnation: Count


class Digest(msgspec.Struct, frozen=True, tag="digest", kw_only=True):
    """All that the sender holds of nodes with `after` < id <= `until`; asks for a `Delta` back.

    None stands for no bound. The bounds let a receiver tell "not in this part" from "not known".
    """

    after: Identifier | None
    until: Identifier | None
    entries: Annotated[tuple[DigestEntry, ...], msgspec.Meta(max_length=4096)]


class Delta(msgspec.Struct, frozen=True, tag="delta", kw_only=True):
    """News on its own: plain gossip, or the answer to a digest, which may want records back."""

    news: News
    wants: Annotated[tuple[Identifier, ...], msgspec.Meta(max_length=4096)] = ()


GossipMessage = Ping | Ack | PingRequest | Digest | Delta
