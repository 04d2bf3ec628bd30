"""A list and a set in one."""

from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.roster import Roster

NAMES = st.sampled_from("abcdefg")


@given(st.lists(st.tuples(st.booleans(), NAMES), max_size=40))
def test_a_roster_holds_what_was_added_and_not_taken_away(steps: list[tuple[bool, str]]) -> None:
    roster, model = Roster(), set()
    for adds, name in steps:
        if adds:
            roster.add(name)
            model.add(name)
        else:
            roster.discard(name)
            model.discard(name)
        assert len(roster) == len(model)
        assert set(roster) == model
        assert {roster[index] for index in range(len(roster))} == model
        assert all((letter in roster) == (letter in model) for letter in "abcdefg")
