"""Blocks, their names, and what a stage knows of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.engine.blocks import BLOCK_TOKENS, BlockPool
from pxd.engine.hashing import BlockHashes
from pxd.engine.mirror import BlockMirror, MirrorError, Run
from pxd.wire import Grant, Opening, Sampling

GREEDY = Sampling(temperature=0)


def names(*tokens: int, root: bytes = b"m") -> list[bytes]:
    return BlockHashes(root, 2).of(tokens, len(tokens) // 2)


def test_a_name_covers_all_that_is_before_it_and_the_model() -> None:
    assert names(1, 2, 3, 4)[0] == names(1, 2, 9, 9)[0]
    assert names(1, 2, 3, 4)[1] != names(9, 2, 3, 4)[1]
    assert names(1, 2)[0] != names(1, 2, root=b"n")[0]
    growing = BlockHashes(b"m", 2)
    assert growing.of([1, 2, 3], 1) == names(1, 2)
    assert growing.of([1, 2, 3, 4], 2) == names(1, 2, 3, 4)


def test_blocks_that_nobody_holds_are_found_until_they_are_needed() -> None:
    pool = BlockPool(4)
    first = pool.allocate(2)
    for block, name in zip(first, (b"a", b"b"), strict=True):
        pool.register(block, name)
    pool.drop(first)
    assert pool.free == 4
    assert pool.find([b"a", b"b", b"c"]) == first
    blank = pool.allocate(2)
    assert pool.find([b"a", b"b"]) == first
    # The end of a prefix goes first: without its beginning it could not be found.
    pool.allocate(1)
    assert pool.find([b"a", b"b"]) == first[:1]
    pool.drop(blank)


def test_the_least_recently_used_prefix_goes_first() -> None:
    pool = BlockPool(2)
    for name in (b"a", b"b"):
        [block] = pool.allocate(1)
        pool.register(block, name)
        pool.drop([block])
    [found] = pool.find([b"a"])
    pool.hold(found)
    pool.drop([found])
    pool.allocate(1)
    assert pool.find([b"a"])
    assert not pool.find([b"b"])


def test_held_blocks_are_never_given_away() -> None:
    pool = BlockPool(2)
    held = pool.allocate(1)
    pool.hold(held[0])
    pool.drop(held)
    assert pool.free == 1
    with pytest.raises(ValueError, match="2 blocks wanted"):
        pool.allocate(2)


def test_what_was_lost_is_not_found() -> None:
    pool = BlockPool(2)
    [block] = pool.allocate(1)
    pool.register(block, b"a")
    pool.forget(block)
    assert not pool.find([b"a"])
    pool.drop([block])
    assert (pool.free, pool.cached) == (2, 0)


def _named(pool: BlockPool, block: int) -> bool:
    return any(pool.block_of(bytes([number])) == block for number in range(10))


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 9)), max_size=80))
def test_no_block_leaks_or_has_two_owners(operations: list[tuple[int, int]]) -> None:
    pool = BlockPool(8)
    held: list[list[int]] = []
    for kind, number in operations:
        if kind == 0 and number <= pool.free:
            held.append(pool.allocate(number))
        elif kind == 1 and held:
            pool.drop(held.pop(number % len(held)))
        elif kind == 2 and held and (group := held[number % len(held)]):
            pool.register(group[0], bytes([number]))
        elif kind == 3:
            found = pool.find([bytes([number])])
            for block in found:
                pool.hold(block)
            held.append(found)
        counts: dict[int, int] = {}
        for block in (block for group in held for block in group):
            counts[block] = counts.get(block, 0) + 1
        assert pool.used == len(counts)
        assert pool.cached - pool.idle == sum(b in counts for b in range(8) if _named(pool, b))
        assert all(pool.holders(block) == count for block, count in counts.items())


def opening(request: int, *hits: int) -> Opening:
    return Opening(request, GREEDY, len(hits) * BLOCK_TOKENS, hits)


def test_a_request_begins_with_what_others_have_left() -> None:
    mirror = BlockMirror()
    assert mirror.open(opening(1)) == []
    mirror.grant([Grant(1, (5, 6, 7))])
    mirror.release([1])
    full = {0: 3 * BLOCK_TOKENS}
    mirror.check([opening(2, 5, 6)], full)
    assert mirror.open(opening(2, 5, 6)) == [Run(0, 0, 2)]
    # It takes the first block over and has a copy of the second.
    assert mirror.grant([Grant(2, (5, 8))]) == []
    assert mirror.blocks_kept(0) == 3
    mirror.check([opening(3, 5, 6)], full | {1: 2 * BLOCK_TOKENS})
    assert mirror.open(opening(3, 5, 6)) == [Run(1, 0, 1), Run(0, 1, 1)]
    assert mirror.grant([Grant(3, (6, 7))]) == [0]


@pytest.mark.parametrize(
    ("asked", "full"),
    [
        (opening(2, 9), {0: 128}),
        (opening(2, 6), {0: 128}),
        (opening(2, 5), {0: BLOCK_TOKENS - 1}),
        (Opening(2, GREEDY, 1, (5,)), {0: 128}),
    ],
)
def test_hits_that_are_not_there_are_refused(asked: Opening, full: dict[int, int]) -> None:
    mirror = BlockMirror()
    mirror.open(opening(1))
    mirror.grant([Grant(1, (5, 6))])
    with pytest.raises(MirrorError):
        mirror.check([asked], full)


def test_what_a_stage_has_lost_is_no_hit() -> None:
    mirror = BlockMirror()
    mirror.open(opening(1))
    mirror.grant([Grant(1, (5,))])
    mirror.lose(1)
    assert mirror.pieces == 0
    with pytest.raises(MirrorError):
        mirror.check([opening(2, 5)], {0: 64})
