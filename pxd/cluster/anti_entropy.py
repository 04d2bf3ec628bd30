"""Full synchronisation: two members exchange what they hold, then only what differs.

After the digest exchange of Cassandra's gossip: a digest costs some 80 bytes per node, records
travel only where the other side lacks them. Members that agree already, as most do that synchronise
every now and then, find out for some 3 bytes per node, by hashes of ranges as in a Merkle tree of
two levels.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from itertools import pairwise

import msgspec

from pxd.cluster.dissemination import NEWS_BUDGET, encoded_size
from pxd.cluster.members import Member, MemberTable, standing
from pxd.cluster.messages import (
    Claim,
    Delta,
    Digest,
    DigestEntry,
    News,
    Part,
    SignedRecord,
    Summary,
)

ENTRIES = 150
"""Digest entries, claims or wanted ids per message; none takes more than 420 bytes."""


_PART = 32
_encoder = msgspec.msgpack.Encoder()


class Difference(msgspec.Struct, frozen=True):
    """What a digest of another member tells, and what it lacks.

    `heard` are its claims; `records` and `claims` go back to it; `wants` are ids whose records it
    should send.
    """

    heard: list[Claim]
    records: list[SignedRecord]
    claims: list[Claim]
    wants: list[str]


def digests(table: MemberTable) -> list[Digest]:
    """All that is held, in parts that each fit a message."""
    return _split(table, sorted(table.members), None, None)


def _split(
    table: MemberTable, nodes: list[str], first: str | None, last: str | None
) -> list[Digest]:
    """Digests of these nodes, which are all that count between the bounds."""
    parts = [nodes[start : start + ENTRIES] for start in range(0, len(nodes), ENTRIES)] or [[]]
    cuts = [first, *(part[-1] for part in parts[:-1]), last]
    return [
        Digest(
            after=after,
            until=until,
            entries=tuple(_entry(table.members[node]) for node in part),
        )
        for part, (after, until) in zip(parts, pairwise(cuts), strict=True)
    ]


def summary(table: MemberTable) -> Summary:
    """All that is held of the living, as hashes."""
    nodes = sorted(table.members)
    bounds = [*nodes[_PART - 1 : -1 : _PART], None]
    parts = zip(bounds, _ranges(nodes, bounds), strict=True)
    return Summary(parts=tuple(Part(until, _hash(table, held)) for until, held in parts))


def differing(table: MemberTable, summary: Summary) -> list[Digest]:
    """All that is held in the parts where the sender of a summary holds something else."""
    bounds = [part.until for part in summary.parts]
    inner = [until for until in bounds[:-1] if until is not None]
    if bounds != [*inner, None] or any(one >= other for one, other in pairwise(inner)):
        return []
    held = _ranges(sorted(table.members), bounds)
    found = []
    for part, nodes, (after, until) in zip(
        summary.parts, held, pairwise([None, *bounds]), strict=True
    ):
        if _hash(table, nodes) != part.digest:
            found += _split(table, nodes, after, until)
    return found


def compare(table: MemberTable, sender: str, digest: Digest) -> Difference:
    """Hold a digest against the table. The dead whom one side does not know stay unknown to it."""
    difference = Difference([], [], [], [])
    theirs = {entry.node: entry for entry in digest.entries}
    for entry in digest.entries:
        member = table.members.get(entry.node)
        if member is None:
            _compare_unknown(table, entry, difference)
        else:
            _compare_known(table, sender, member, entry, difference)
    for node, member in table.members.items():
        if node not in theirs and member.live and _within(node, digest.after, digest.until):
            difference.records.append(table.signed[node])
            _append_claim(table, node, difference)
    return difference


def deltas(
    records: Iterable[SignedRecord], claims: Iterable[Claim], wants: Iterable[str]
) -> Iterator[Delta]:
    """Answers that carry all this, each within the size limit; always at least one."""
    told = tuple(claims)
    # Claims about a node mean nothing to a receiver that does not have its record yet.
    news = [News(records=batch) for batch in _batches(records)]
    news += [News(claims=told[i : i + ENTRIES]) for i in range(0, len(told), ENTRIES)]
    wanted = tuple(wants)
    parts = [Delta(news=part, answer=True) for part in news]
    parts += [
        Delta(news=News(), wants=wanted[i : i + ENTRIES], answer=True)
        for i in range(0, len(wanted), ENTRIES)
    ]
    yield from parts or [Delta(news=News(), answer=True)]


def _ranges(nodes: list[str], bounds: list[str | None]) -> Iterator[list[str]]:
    """Sorted nodes cut after each bound."""
    start = 0
    for bound in bounds:
        end = len(nodes) if bound is None else bisect_right(nodes, bound)
        yield nodes[start:end]
        start = end


def _hash(table: MemberTable, nodes: list[str]) -> bytes:
    # Who is gone is forgotten sooner here and later there.
    members = (table.members[node] for node in nodes)
    views = [(m.record.id, m.record.order, m.state, m.incarnation) for m in members if m.live]
    return hashlib.blake2b(_encoder.encode(views), digest_size=8).digest()


def _batches(records: Iterable[SignedRecord]) -> Iterator[tuple[SignedRecord, ...]]:
    batch: list[SignedRecord] = []
    size = 0
    for record in records:
        more = encoded_size(record)
        if batch and size + more > NEWS_BUDGET:
            yield tuple(batch)
            batch, size = [], 0
        batch.append(record)
        size += more
    if batch:
        yield tuple(batch)


def _entry(member: Member) -> DigestEntry:
    record = member.record
    return DigestEntry(record.id, record.order, member.state, member.incarnation, member.proof)


def _within(node: str, after: str | None, until: str | None) -> bool:
    return (after is None or node > after) and (until is None or node <= until)


def _compare_unknown(table: MemberTable, entry: DigestEntry, difference: Difference) -> None:
    if entry.state in ("dead", "left"):
        return
    if table.is_buried(entry.node, entry.record[0]):
        _append_claim(table, entry.node, difference)
    elif not table.is_full:
        difference.wants.append(entry.node)


def _compare_known(
    table: MemberTable, sender: str, member: Member, entry: DigestEntry, difference: Difference
) -> None:
    if entry.state != "alive":
        claim = Claim(entry.node, entry.state, entry.incarnation, sender, entry.proof)
        difference.heard.append(claim)
    if member.standing > standing(entry.state, entry.incarnation):
        _append_claim(table, entry.node, difference)
    if entry.record > member.record.order:
        # Of this node itself too: its own signature shows whether it has to contradict.
        difference.wants.append(entry.node)
    elif entry.record < member.record.order:
        difference.records.append(table.signed[entry.node])


def _append_claim(table: MemberTable, node: str, difference: Difference) -> None:
    claim = table.claim_about(node)
    if claim is not None:
        difference.claims.append(claim)
