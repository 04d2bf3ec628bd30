"""Rendezvous hashing: who serves a key, with few keys moved when the members change.

Thaler and Ravishankar, "A Name-Based Mapping Scheme for Rendezvous" (1996). Every member gets a
pseudo-random score for the key and the highest wins, so a member that leaves moves only its own
keys, and one that joins takes keys only for itself.
"""

import hashlib
from collections.abc import Iterable


def rendezvous(key: str, members: Iterable[str]) -> str:
    """The member for this key: the same in every process, whatever the order of `members`.

    Raises ValueError without members.
    """
    return max(members, key=lambda member: (_score(key, member), member))


def _score(key: str, member: str) -> bytes:
    # The key may come from a client: whatever is in it, it has bytes and a length of its own.
    first = key.encode("utf-8", "surrogatepass")
    second = member.encode("utf-8", "surrogatepass")
    return hashlib.sha256(len(first).to_bytes(8, "big") + first + second).digest()
