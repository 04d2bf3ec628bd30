from hypothesis import given
from hypothesis import strategies as st

from pxd.engine.speculation import (
    LONGEST,
    LOOKBACK,
    PAUSE,
    PLAIN_EVERY,
    SHORTEST,
    Confidence,
    Lookup,
    PromptLookup,
)


def test_what_followed_before_is_guessed_again() -> None:
    lookup = Lookup()
    lookup.follow([1, 2, 3, 4, 5, 9, 1, 2])
    assert lookup.guess(3) == [3, 4, 5]
    assert lookup.guess(6) == [3, 4, 5, 9, 1, 2]


def test_what_repeats_itself_is_taken_to_go_on() -> None:
    lookup = Lookup()
    lookup.follow([8, 1, 2, 3, 1, 2])
    assert lookup.guess(7) == [3, 1, 2, 3, 1, 2, 3]


def test_of_a_long_prompt_only_the_end_is_looked_at() -> None:
    lookup = Lookup()
    tokens = [1, 2, 3, *range(10, 10 + LOOKBACK), 1, 2]
    lookup.follow(tokens)
    assert lookup.guess(1) == []
    lookup.follow([*tokens, 10 + LOOKBACK - 2, 10 + LOOKBACK - 1])
    assert lookup.guess(2) == [1, 2]


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
def test_guesses_go_on_as_after_the_same_words_before(tokens: list[int], most: int, data) -> None:
    lookup, whole = Lookup(), Lookup()
    cut = data.draw(st.integers(0, len(tokens)))
    lookup.follow(tokens[:cut])
    lookup.follow(tokens)
    whole.follow(tokens)
    guess = lookup.guess(most)
    assert guess == whole.guess(most)
    starts = [
        place
        for length in range(SHORTEST, LONGEST + 1)
        for place in range(length, len(tokens))
        if tokens[place - length : place] == tokens[-length:]
    ]
    assert bool(guess) == bool(starts)
    if guess:
        whole_text = tokens + guess
        assert len(guess) == most
        assert any(whole_text[place : place + most] == guess for place in starts)


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
    for _ in range(PAUSE):
        assert confidence.width == 0
        confidence.passed()
    assert confidence.width == 1


def test_now_and_then_a_step_is_plain() -> None:
    guesser, tokens, plain = PromptLookup(), [1, 2, 3] * 4, 0
    for _ in range(2 * PLAIN_EVERY + 2):
        guesses = guesser.guess(tokens, 3)
        guesser.learn(len(guesses), len(guesses))
        plain += not guesses
    assert plain == 2
