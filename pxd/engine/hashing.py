"""Names of KV blocks by what is in them, so that equal prefixes are found again.

Each block's hash covers the hash before it, so it stands for all tokens from the first one on, as
in vLLM's prefix caching. SHA-256, because a collision would answer with somebody else's context.
"""

import hashlib
from array import array
from collections.abc import Sequence

BlockHash = bytes


class BlockHashes:
    """The hashes of a growing token sequence's full blocks. `root` names model and revision."""

    __slots__ = ("_block_tokens", "_hashes", "_root")

    def __init__(self, root: bytes, block_tokens: int) -> None:
        self._root = hashlib.sha256(b"pxd block root 1" + root).digest()
        self._block_tokens = block_tokens
        self._hashes: list[BlockHash] = []

    def of(self, tokens: Sequence[int], count: int) -> list[BlockHash]:
        """The first `count` blocks' hashes; `tokens` begin as in every earlier call."""
        size = self._block_tokens
        while len(self._hashes) < count:
            place = len(self._hashes)
            parent = self._hashes[-1] if self._hashes else self._root
            part = array("i", tokens[place * size : (place + 1) * size]).tobytes()
            self._hashes.append(hashlib.sha256(parent + part).digest())
        return self._hashes[:count]
