"""The model that is served: the last choice counts, and there is always a later one."""

from pxd.cluster.messages import LAST_COUNT
from pxd.cluster.records import ModelChoice
from pxd.cluster.stamps import ceiling
from pxd.serving.choice import choose, latest_choice

NOW = 1.8e9


def test_the_latest_choice_counts() -> None:
    first = choose(latest_choice([None], ceiling(NOW)), "a", "one")
    second = choose(first, "b", "two")
    assert latest_choice([second, None, first], ceiling(NOW)) == second
    assert choose(second, "c", "two") == second


def test_a_member_cannot_make_the_last_choice_of_all() -> None:
    """One more than the greatest number would be no record that others take."""
    most = ceiling(NOW)
    absurd = ModelChoice(LAST_COUNT, "mallory", "bad")
    driven = ModelChoice(most, "mallory", "bad")
    assert latest_choice([absurd, driven], most) == driven
    mine = choose(driven, "a", "good")
    assert latest_choice([absurd, driven, mine], ceiling(NOW + 0.001)) == mine
