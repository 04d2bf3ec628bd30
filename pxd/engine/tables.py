"""What a stage that stores KV by block number knows of the head's blocks.

The head names blocks, and a block's number is its place in the stage's storage. Here it is tracked
whose table each block is in, and how much of a sequence it holds. See `pxd.engine.mirror` for
stages that keep each request's KV in one piece.
"""

from collections.abc import Iterable, Mapping, Sequence

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.wire import Grant, Opening


class TableError(Exception):
    """What the head says does not fit what was said before; nothing has been changed."""


class BlockTables:
    """Blocks 0 to `capacity` - 1. Of a step apply `release`, then `check`, `open`, and `written`
    for each row, in this order."""

    def __init__(self, capacity: int) -> None:
        self.capacity = capacity
        self._tables: dict[int, list[int]] = {}
        # Which block of a sequence it holds, and how many of its positions.
        self._held: dict[int, tuple[int, int]] = {}

    @property
    def used(self) -> int:
        """Blocks that are in some table."""
        return len({block for table in self._tables.values() for block in table})

    @property
    def kept(self) -> int:
        """Blocks in no table that hold something."""
        tabled = {block for table in self._tables.values() for block in table}
        return sum(block not in tabled and held > 0 for block, (_, held) in self._held.items())

    def clear(self) -> None:
        """Nothing that was said so far holds any more."""
        self._tables.clear()
        self._held.clear()

    def table(self, request: int) -> Sequence[int]:
        """The request's blocks in the order of its positions."""
        return self._tables[request]

    def owners(self, blocks: Sequence[int]) -> list[tuple[int | None, int]]:
        """The request in whose table each block is, and its place there."""
        owners: dict[int, tuple[int | None, int]] = {
            block: (request, place)
            for request, table in self._tables.items()
            for place, block in enumerate(table)
        }
        return [owners.get(block, (None, 0)) for block in blocks]

    def is_full(self, block: int) -> bool:
        """Whether it holds all positions of a block, in a table or not."""
        _, held = self._held.get(block, (0, 0))
        return held == BLOCK_TOKENS

    def check(
        self, openings: Sequence[Opening], grants: Iterable[Grant], lengths: Mapping[int, int]
    ) -> None:
        """Raises `TableError` unless all hits are there and every request of `lengths`, positions
        by request, will have blocks enough."""
        for opening in openings:
            if opening.cached != len(opening.hits) * BLOCK_TOKENS:
                raise TableError(f"{len(opening.hits)} blocks for {opening.cached} positions")
            for place, block in enumerate(opening.hits):
                if self._held.get(block) != (place, BLOCK_TOKENS):
                    raise TableError(f"block {block} does not hold block {place} of a prefix")
        blocks = {number: len(table) for number, table in self._tables.items()}
        blocks.update((opening.request, 0) for opening in openings)
        for grant in grants:
            beyond = [block for block in grant.blocks if block >= self.capacity]
            if beyond:
                raise TableError(f"this stage has {self.capacity} blocks, and no {beyond[0]}")
            if grant.request in blocks:
                blocks[grant.request] += len(grant.blocks)
        for request, length in lengths.items():
            if blocks.get(request, 0) * BLOCK_TOKENS < length:
                raise TableError(f"request {request} has not enough blocks for {length} positions")

    def open(self, openings: Iterable[Opening], grants: Iterable[Grant]) -> list[tuple[int, int]]:
        """Begin tables and extend them; returns (from, to) of the blocks to be copied, all before
        any of them is written to."""
        hits = {opening.request: opening.hits for opening in openings}
        self._tables.update((request, []) for request in hits)
        copies = []
        for grant in grants:
            table = self._tables.get(grant.request)
            if table is None:
                continue
            wanted = hits.get(grant.request, ())
            for block in grant.blocks:
                place = len(table)
                if place < len(wanted) and wanted[place] != block:
                    copies.append((wanted[place], block))
                table.append(block)
                self._held[block] = place, BLOCK_TOKENS if place < len(wanted) else 0
        return copies

    def written(self, request: int, begin: int, end: int) -> None:
        """The request has its positions [begin, end), and none behind them."""
        table = self._tables[request]
        for place in range(begin // BLOCK_TOKENS, -(-end // BLOCK_TOKENS)):
            self._held[table[place]] = place, min(end - place * BLOCK_TOKENS, BLOCK_TOKENS)

    def release(self, requests: Iterable[int]) -> None:
        """The requests have ended; what is in their blocks stays. Unknown ones are ignored."""
        for request in requests:
            self._tables.pop(request, None)

    def lose(self, request: int) -> None:
        """What is in the request's blocks can no longer be relied on."""
        for block in self._tables.pop(request, ()):
            self._held.pop(block, None)
