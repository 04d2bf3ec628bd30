from hypothesis import given
from hypothesis import strategies as st

from pxd.engine.speculation import LONGEST, SHORTEST, Confidence, Lookup


def test_what_followed_before_is_guessed_again() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 4, 5, 9, 1, 2])
    assert lookup.guess(3) == [3, 4, 5]
    assert lookup.guess(99) == [3, 4, 5, 9, 1, 2]


def test_a_longer_match_wins_over_a_later_one() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 70, 8, 2, 3, 80, 1, 2, 3])
    assert lookup.guess(1) == [70]


def test_without_a_match_nothing_is_guessed() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 4, 5])
    assert lookup.guess(4) == []
    assert Lookup().guess(4) == []


@given(st.lists(st.integers(0, 3), max_size=60), st.integers(1, 6), st.data())
def test_guesses_are_copies_of_what_stood_there(tokens: list[int], most: int, data) -> None:
    lookup, whole = Lookup(), Lookup()
    cut = data.draw(st.integers(0, len(tokens)))
    lookup.follow(tokens[:cut])
    lookup.follow(tokens)
    whole.follow(tokens)
    guess = lookup.guess(most)
    assert guess == whole.guess(most)
    if guess:
        starts = [
            place
            for length in range(SHORTEST, LONGEST + 1)
            for place in range(length, len(tokens))
            if tokens[place - length : place] == tokens[-length:]
        ]
        assert any(tokens[place : place + len(guess)] == guess for place in starts)


def test_confidence_follows_success() -> None:
    confidence = Confidence(8)
    assert confidence.width == 4
    confidence.learn(4, 4)
    assert confidence.width == 8
    confidence.learn(8, 3)
    assert confidence.width == 8
    for _ in range(4):
        confidence.learn(8, 0)
    assert confidence.width == 0
    for _ in range(16):
        confidence.passed()
    assert confidence.width == 1
