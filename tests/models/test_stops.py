from itertools import pairwise

from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.models.stops import StopMatcher

# Few letters, so that beginnings of stop strings are frequent.
letters = st.text("ab\n", max_size=30)
stops = st.lists(st.text("ab\n", max_size=4), max_size=3)


def cut(text: str, at: list[int]) -> list[str]:
    places = sorted({0, len(text), *(place % (len(text) + 1) for place in at)})
    return [text[a:b] for a, b in pairwise(places)]


def naive(text: str, stop: list[str]) -> tuple[str, bool]:
    """Everything before the place where the earliest stop string begins."""
    places = [place for s in stop if s and (place := text.find(s)) >= 0]
    return (text[: min(places)], True) if places else (text, False)


@settings(deadline=None)
@given(letters, stops, st.lists(st.integers(0, 99), max_size=8))
def test_pieces_give_what_the_whole_text_gives(
    text: str, stop: list[str], places: list[int]
) -> None:
    matcher = StopMatcher(stop)
    seen, stopped = "", False
    for piece in cut(text, places):
        certain, stopped = matcher.add(piece)
        seen += certain
        if stopped:
            break
    expected, _ = naive(text, stop)
    # A stop string may be complete only behind a longer one that is still open at the end.
    assert seen + ("" if stopped else matcher.finish()) == expected


@settings(deadline=None)
@given(letters, stops)
def test_nothing_is_held_back_that_cannot_become_a_stop_string(text: str, stop: list[str]) -> None:
    matcher = StopMatcher(stop)
    certain, stopped = matcher.add(text)
    held = text[len(certain) :]
    if not stopped:
        assert not held or any(s.startswith(held[: len(s)]) and s for s in stop)


def test_text_after_a_stop_string_is_dropped() -> None:
    matcher = StopMatcher(["END"])
    assert matcher.add("one E") == ("one ", False)
    assert matcher.add("ND two") == ("", True)
    assert matcher.add("three") == ("", True)
    assert matcher.finish() == ""


def test_without_stop_strings_everything_passes_at_once() -> None:
    matcher = StopMatcher([""])
    assert matcher.add("abc") == ("abc", False)
    assert matcher.finish() == ""
