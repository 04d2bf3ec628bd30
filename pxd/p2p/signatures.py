"""Signatures of nodes: a peer id of an Ed25519 key holds the public key itself."""

import functools
import logging

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from libp2p.crypto.keys import KeyType
from libp2p.peer.id import ID

log = logging.getLogger("pxd.p2p")

KEYS_REMEMBERED = 8192
_LONGEST_ID = 128


class NodeSigner:
    """Signs as the node with this key, and knows every other node's key by its peer id."""

    def __init__(self, node_seed: bytes) -> None:
        self._key = Ed25519PrivateKey.from_private_bytes(node_seed)

    def sign(self, statement: bytes) -> bytes:
        return self._key.sign(statement)

    def verify(self, node: str, statement: bytes, signature: bytes) -> bool:
        key = _public_key(node)
        if key is None:
            return False
        try:
            key.verify(signature, statement)
        except InvalidSignature:
            return False
        return True


@functools.lru_cache(maxsize=KEYS_REMEMBERED)
def _public_key(node: str) -> Ed25519PublicKey | None:
    """The key inside a peer id; None for whatever is not the peer id of an Ed25519 key."""
    if len(node) > _LONGEST_ID:
        return None
    try:
        peer = ID.from_base58(node)
    except ValueError as error:
        log.debug("%r is no peer id: %s", node, error)
        return None
    key = peer.extract_public_key()
    # One key must not go by several names.
    if key is None or key.get_type() != KeyType.Ed25519 or peer.to_base58() != node:
        return None
    if ID.from_pubkey(key) != peer:
        return None
    return Ed25519PublicKey.from_public_bytes(key.to_bytes())
