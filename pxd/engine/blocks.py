"""Logical KV blocks: who holds which, and which still hold a prefix that can be used again.

The head of a pipeline decides; every stage mirrors the same numbers in storage of its own. Blocks
with a hash that nobody holds stay findable until they are needed, least recently used first. After
vLLM's block pool and prefix cache.
"""

from collections import OrderedDict
from collections.abc import Iterable, Sequence
from itertools import islice

from pxd.engine.hashing import BlockHash

BLOCK_TOKENS = 64


def blocks_for(tokens: int) -> int:
    return -(-tokens // BLOCK_TOKENS)


class BlockPool:
    """Blocks 0 to `capacity` - 1, each with a count of holders. Copies in progress hold, too."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._holders: dict[int, int] = {}
        self._blank = list(range(capacity - 1, -1, -1))
        # Held by nobody but findable, in the order in which they will be given away.
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._by_hash: dict[BlockHash, int] = {}
        self._hash_of: dict[int, BlockHash] = {}

    @property
    def free(self) -> int:
        """Blocks that nobody holds."""
        return len(self._blank) + len(self._idle)

    @property
    def used(self) -> int:
        return self.capacity - self.free

    @property
    def idle(self) -> int:
        """Those of the `free` that `find` may return."""
        return len(self._idle)

    @property
    def cached(self) -> int:
        """Blocks that `find` may return, held or not."""
        return len(self._by_hash)

    def holders(self, block: int) -> int:
        return self._holders.get(block, 0)

    def allocate(self, count: int) -> list[int]:
        """`count` blocks for one holder; their old content is forgotten. At most `free`."""
        if count > self.free:
            raise ValueError(f"{count} blocks wanted, {self.free} are free")
        blocks = []
        for _ in range(count):
            if self._blank:
                block = self._blank.pop()
            else:
                block, _ = self._idle.popitem(last=False)
                del self._by_hash[self._hash_of.pop(block)]
            self._holders[block] = 1
            blocks.append(block)
        return blocks

    def block_of(self, name: BlockHash) -> int | None:
        return self._by_hash.get(name)

    def next_out(self, count: int) -> list[tuple[int, BlockHash]]:
        """Those with a hash among the `count` blocks that will be given away next."""
        idle = islice(self._idle, max(0, count - len(self._blank)))
        return [(block, self._hash_of[block]) for block in idle]

    def find(self, hashes: Iterable[BlockHash]) -> list[int]:
        """The blocks of the longest known prefix of `hashes`."""
        found = []
        for name in hashes:
            block = self._by_hash.get(name)
            if block is None:
                break
            found.append(block)
        return found

    def hold(self, block: int) -> None:
        """One holder more, of a block that is held or findable."""
        if block in self._holders:
            self._holders[block] += 1
        else:
            del self._idle[block]
            self._holders[block] = 1

    def drop(self, blocks: Sequence[int], *, soon: bool = False) -> None:
        """One holder less for each, in the order of their positions.

        Of one prefix the end is given away first: without its beginning it could not be found.
        With `soon` they are given away before all others, in the order in which they are named.
        """
        for block in reversed(blocks):
            self._holders[block] -= 1
            if not self._holders[block]:
                del self._holders[block]
                if block in self._hash_of:
                    self._idle[block] = None
                    if soon:
                        self._idle.move_to_end(block, last=False)
                else:
                    self._blank.append(block)

    def register(self, block: int, name: BlockHash) -> None:
        """A held block is full and has this content on every stage. The first of equals counts."""
        if block not in self._holders:
            raise ValueError(f"nobody holds block {block}")
        if name not in self._by_hash and block not in self._hash_of:
            self._by_hash[name] = block
            self._hash_of[block] = name

    def forget(self, block: int) -> None:
        """What is in a held block can no longer be relied on."""
        name = self._hash_of.pop(block, None)
        if name is not None:
            del self._by_hash[name]
