"""Signatures for tests that only have names for nodes: quick, and as hard to forge as need be."""

import hashlib

from pxd.cluster.messages import SignedRecord
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import seal


class FakeSigner:
    """Everybody could sign as anybody; whoever is to cheat uses the wrong one on purpose."""

    def __init__(self, node: str) -> None:
        self._node = node

    def sign(self, statement: bytes) -> bytes:
        return _signature(self._node, statement)

    def verify(self, node: str, statement: bytes, signature: bytes) -> bool:
        return signature == _signature(node, statement)


def signed(record: NodeRecord) -> SignedRecord:
    """The record as its node itself would send it."""
    return seal(record, FakeSigner(record.id))


def _signature(node: str, statement: bytes) -> bytes:
    return hashlib.blake2b(node.encode() + b"\0" + statement).digest()
