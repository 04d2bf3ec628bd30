"""Guessing the next tokens of a request from what it has said before.

Prompt lookup (Saxena 2023): where the last few tokens stood before, what followed them then is
likely to follow again. A guess is checked by the model itself in one pass, so it changes nothing
but the time; it pays where a pass through the pipeline takes long, whatever is in it.
"""

from collections.abc import Sequence
from typing import Protocol

from pxd.wire import MAX_GUESSES

LONGEST, SHORTEST = 4, 2
"""Tokens that must agree, of which the longest match is preferred."""

LOOKBACK = 8192
"""Tokens of what there is at first that are looked at: a long prompt must not hold up the head."""

PAUSE = 4
"""Tokens without a guess after a single one was wrong."""

PLAIN_EVERY = 32
"""So many guesses are followed by a step without one, which shows what that takes by now."""


class Guesser(Protocol):
    """What one request is likely to say."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        """Up to `most` tokens that may follow `tokens`, which begin as in every earlier call."""

    def learn(self, guessed: int, right: int) -> None:
        """A step is back. Of `guessed` tokens, maybe none, the first `right` were drawn."""


class Lookup:
    """Where each run of `SHORTEST` to `LONGEST` tokens of a growing sequence stood last."""

    __slots__ = ("_seen", "_skipped", "_tokens")

    def __init__(self) -> None:
        self._skipped = 0
        self._tokens: list[int] = []
        self._seen: dict[tuple[int, ...], int] = {}

    def follow(self, tokens: Sequence[int]) -> None:
        """`tokens` begin with all of those followed so far."""
        known = self._tokens
        if not known:
            self._skipped = max(0, len(tokens) - LOOKBACK)
        for token in tokens[self._skipped + len(known) :]:
            # What ends before this token is indexed only now, so that it is never its own match.
            for length in range(SHORTEST, min(LONGEST, len(known)) + 1):
                self._seen[tuple(known[-length:])] = len(known)
            known.append(token)

    def guess(self, most: int) -> list[int]:
        """`most` tokens that may come next, or none.

        What has begun to repeat itself is taken to go on repeating.
        """
        known = self._tokens
        for length in range(min(LONGEST, len(known)), SHORTEST - 1, -1):
            place = self._seen.get(tuple(known[-length:]))
            if place is not None:
                period = len(known) - place
                return [known[place + i % period] for i in range(most)]
        return []


class Confidence:
    """How many tokens to guess for one request: more while guesses come true, fewer otherwise."""

    __slots__ = ("_most", "_pause", "_width")

    def __init__(self, most: int) -> None:
        self._most = most
        self._width = min(4, most)
        self._pause = 0

    @property
    def width(self) -> int:
        return 0 if self._pause else self._width

    def passed(self) -> None:
        """A token was drawn without a guess."""
        self._pause = max(0, self._pause - 1)

    def learn(self, guessed: int, right: int) -> None:
        """Of a guess of `guessed` tokens the first `right` were what the model drew."""
        if right == guessed:
            self._width = min(self._most, 2 * self._width)
        elif right == 0:
            if self._width == 1:
                # Guess again only after a while: even a wrong guess costs some computing.
                self._pause = PAUSE
            self._width = max(1, self._width // 2)


class PromptLookup:
    """The `Guesser` that pxd serves with."""

    __slots__ = ("_confidence", "_lookup", "_since_plain")

    def __init__(self) -> None:
        self._lookup = Lookup()
        self._confidence = Confidence(MAX_GUESSES)
        self._since_plain = 0

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        width = min(most, self._confidence.width)
        if not width or self._since_plain >= PLAIN_EVERY:
            return []
        self._lookup.follow(tokens)
        return self._lookup.guess(width)

    def learn(self, guessed: int, right: int) -> None:
        if guessed:
            self._confidence.learn(guessed, right)
            self._since_plain += 1
        else:
            self._confidence.passed()
            self._since_plain = 0
