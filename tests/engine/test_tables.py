"""Tables of blocks, as a stage keeps them that stores KV by block number."""

from collections.abc import Sequence

import pytest

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.tables import BlockTables, TableError
from pxd.wire import Grant, Opening, Sampling


def opening(request: int, hits: Sequence[int] = (), cached: int | None = None) -> Opening:
    positions = len(hits) * BLOCK_TOKENS if cached is None else cached
    return Opening(request, Sampling(), cached=positions, hits=tuple(hits))


def begun(tables: BlockTables, request: int, blocks: Sequence[int], length: int) -> None:
    tables.open([opening(request)], [Grant(request, tuple(blocks))])
    tables.written(request, 0, length)


def test_a_table_is_what_was_granted_in_order() -> None:
    tables = BlockTables(8)
    tables.open([opening(1)], [Grant(1, (5, 2)), Grant(9, (3,))])
    tables.open([], [Grant(1, (7,))])
    assert list(tables.table(1)) == [5, 2, 7]
    tables.written(1, 0, BLOCK_TOKENS + 1)
    assert (tables.used, tables.kept) == (3, 0)
    tables.release([1, 4])
    # Nothing has been written to the third.
    assert (tables.used, tables.kept) == (0, 2)


def test_hits_are_copied_unless_they_stay_at_their_place() -> None:
    tables = BlockTables(8)
    begun(tables, 1, [4, 6], 2 * BLOCK_TOKENS)
    tables.release([1])
    given = opening(2, [4, 6]), Grant(2, (4, 1, 0))
    tables.check([given[0]], [given[1]], {2: 2 * BLOCK_TOKENS + 1})
    assert tables.open([given[0]], [given[1]]) == [(6, 1)]
    # The copy is a block of the prefix now, as good as the one it was made from.
    tables.check([opening(3, [4, 1])], [Grant(3, (2, 3))], {3: 2 * BLOCK_TOKENS})


@pytest.mark.parametrize(
    ("hits", "cached", "words"),
    [
        ([6, 4], None, "block 6 does not hold block 0"),
        ([4, 6, 3], None, "block 3 does not hold block 2"),
        ([4, 6, 5], None, "block 5 does not hold block 2"),
        ([4, 6], BLOCK_TOKENS, "2 blocks for 64 positions"),
    ],
)
def test_hits_that_are_not_there_are_refused(
    hits: list[int], cached: int | None, words: str
) -> None:
    tables = BlockTables(8)
    # Of block 5 one position is missing.
    begun(tables, 1, [4, 6, 5], 3 * BLOCK_TOKENS - 1)
    with pytest.raises(TableError, match=words):
        tables.check([opening(2, hits, cached)], [Grant(2, (0, 1, 2))], {})


def test_what_was_given_away_or_lost_is_no_hit() -> None:
    tables = BlockTables(8)
    begun(tables, 1, [4], BLOCK_TOKENS)
    tables.release([1])
    tables.open([opening(2)], [Grant(2, (4,))])
    with pytest.raises(TableError, match="block 4"):
        tables.check([opening(3, [4])], [Grant(3, (0,))], {})
    begun(tables, 5, [6], BLOCK_TOKENS)
    tables.lose(5)
    with pytest.raises(TableError, match="block 6"):
        tables.check([opening(3, [6])], [Grant(3, (0,))], {})
    begun(tables, 7, [1], BLOCK_TOKENS)
    tables.clear()
    with pytest.raises(TableError, match="block 1"):
        tables.check([opening(3, [1])], [Grant(3, (0,))], {})


def test_what_is_taken_back_is_no_hit_any_more() -> None:
    tables = BlockTables(8)
    begun(tables, 1, [4], BLOCK_TOKENS)
    tables.written(1, BLOCK_TOKENS - 4, BLOCK_TOKENS - 2)
    with pytest.raises(TableError, match="block 4"):
        tables.check([opening(3, [4])], [Grant(3, (0,))], {})


def test_too_few_blocks_and_blocks_that_there_are_not() -> None:
    tables = BlockTables(4)
    tables.check([opening(1)], [Grant(1, (3,))], {1: BLOCK_TOKENS})
    with pytest.raises(TableError, match="has not enough blocks for 65 positions"):
        tables.check([opening(1)], [Grant(1, (3,))], {1: BLOCK_TOKENS + 1})
    with pytest.raises(TableError, match="4 blocks, and no 4"):
        tables.check([opening(1)], [Grant(1, (3, 4))], {1: BLOCK_TOKENS})
    begun(tables, 2, [0], 5)
    tables.check([], [Grant(2, (1,))], {2: 2 * BLOCK_TOKENS})


def test_whose_a_block_is_and_whether_it_is_full() -> None:
    tables = BlockTables(8)
    begun(tables, 1, [4, 6], BLOCK_TOKENS + 1)
    begun(tables, 2, [3], BLOCK_TOKENS)
    assert tables.owners([6, 3, 0]) == [(1, 1), (2, 0), (None, 0)]
    assert [block for block in range(8) if tables.is_full(block)] == [3, 4]
    tables.release([1])
    tables.lose(2)
    assert tables.owners([4, 3]) == [(None, 0), (None, 0)]
    assert [block for block in range(8) if tables.is_full(block)] == [4]
