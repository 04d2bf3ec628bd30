"""The ban list: merges to the same everywhere, stays bounded, and cannot be jammed at a stroke."""

from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.bans import MAX_BANS, Ban, BanTable
from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.stamps import ceiling

BANS = st.lists(
    st.builds(
        Ban,
        peer=st.sampled_from("abcdef"),
        stamp=st.integers(0, 20),
        banned=st.booleans(),
        by=st.sampled_from("xyz"),
        name=st.sampled_from(["", "ben"]),
    ),
    max_size=30,
)


@given(BANS, BANS, BANS)
def test_tables_that_have_heard_the_same_are_equal(
    one: list[Ban], two: list[Ban], three: list[Ban]
) -> None:
    a = BanTable().merge(one).merge(two).merge(three)
    b = BanTable().merge(three).merge(one + two)
    c = BanTable().merge(BanTable().merge(two).entries).merge(a.entries)
    assert a == b == c
    assert a.digest == b.digest == c.digest
    assert a.merge(b.entries) == a


@given(BANS)
def test_a_new_entry_replaces_whatever_is_held(bans: list[Ban]) -> None:
    table = BanTable().merge(bans)
    for banned in (True, False):
        after = table.merge([table.next("a", banned=banned, by="z", name="ben")])
        assert ("a" in after.banned) is banned
        assert after.banned - {"a"} == table.banned - {"a"}
        table = after


def test_the_last_word_counts_whoever_says_it_and_a_ban_wins_a_tie() -> None:
    table = BanTable().merge([Ban("a", 5, True, "x")])
    assert "a" in table.merge([Ban("a", 4, False, "z")]).banned
    assert "a" not in table.merge([Ban("a", 6, False, "w")]).banned
    assert "a" in table.merge([Ban("a", 5, False, "z")]).banned


def test_equal_digests_mean_equal_tables() -> None:
    table = BanTable().merge([Ban("a", 1, True, "x"), Ban("b", 2, True, "x")])
    assert table.digest == BanTable(reversed(table.entries)).digest
    for other in ([Ban("a", 1, True, "x")], [Ban("a", 3, False, "x")], [Ban("c", 1, True, "x")]):
        assert (BanTable(other).digest == table.digest) is (BanTable(other) == table) is False


def test_the_table_is_bounded_and_pardons_go_first() -> None:
    table = BanTable()
    for number in range(10):
        table = table.merge([table.next(f"pardoned{number}", banned=False, by="x")])
    for number in range(MAX_BANS + 100):
        assert table.is_full is (number >= MAX_BANS)
        table = table.merge([table.next(f"banned{number:05}", banned=True, by="x")])
    assert len(table.entries) == MAX_BANS
    assert len(table.banned) == MAX_BANS
    assert "banned00099" not in table.banned
    assert "banned00100" in table.banned


def test_stamps_cannot_be_used_up() -> None:
    now = 1.8e9
    table = BanTable().merge([Ban("a", 1, True, "x")])
    jam = Ban("a", LAST_COUNT, True, "mallory")
    assert table.merge([jam], ceiling(now)) == table
    # As far as it can be driven, each millisecond still has a stamp.
    driven = table.merge([Ban("b", ceiling(now), False, "mallory")], ceiling(now))
    kick = driven.next("b", banned=True, by="x")
    assert "b" in driven.merge([kick], ceiling(now + 0.001)).banned
    # Whoever comes later, or was away, takes it all the same.
    assert BanTable().merge([kick], ceiling(now + 0.001)).banned == {"b"}
    assert table.next("a", banned=True, by="x").stamp <= ceiling(0.0), "a clock that is not set"


def test_at_the_end_of_all_numbers_a_ban_still_counts() -> None:
    table = BanTable([Ban("a", LAST_COUNT, False, "mallory")])
    assert "a" in table.merge([table.next("a", banned=True, by="x")]).banned
