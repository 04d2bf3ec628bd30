"""Token ids to text, piece by piece, at a bounded cost per token."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# Of a UTF-8 character all but the last byte, so at most that many tokens, can be unfinished.
MAX_UNFINISHED = 3
WINDOW_TOKENS = 32
KEPT_TOKENS = 8


class Detokenizer:
    """Turns one growing sequence of ids into text that never needs taking back.

    Decoders look at neighbours (leading spaces, bytes of one character), so ids cannot be decoded
    one by one. Instead a window of the last ids is decoded again with each addition, as in the
    prefix and read offsets of text-generation-inference and vLLM. Pieces concatenated equal
    ``decode(all ids)``, provided that ids further back than the window have no influence and, for
    decoders with byte fallback, that the bytes are valid UTF-8 without U+FFFD itself.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        self._given = 0
        self._unfinished = 0

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is now certain; empty while a character is unfinished."""
        return "".join([self._add(token) for token in ids])

    def finish(self) -> str:
        """Return the rest; no ids come after this."""
        return self._take(len(self._text))

    def _add(self, token: int) -> str:
        self._window.append(token)
        self._text = self._decode(self._window)
        if not self._text.endswith(REPLACEMENT):
            self._unfinished = 0
            piece = self._take(len(self._text))
        else:
            self._unfinished += 1
            if self._unfinished <= MAX_UNFINISHED:
                return ""
            # No character is that long: the bytes are invalid, all but the last ones for good.
            piece = self._take(len(self._text) - MAX_UNFINISHED)
        if len(self._window) > WINDOW_TOKENS:
            self._shorten()
        return piece

    def _take(self, end: int) -> str:
        piece = self._text[self._given : end]
        self._given = max(self._given, end)
        return piece

    def _shorten(self) -> None:
        """Drop ids from the front where what is left still decodes to the end of the text."""
        rest = len(self._text) - self._given
        for kept in range(KEPT_TOKENS, WINDOW_TOKENS):
            text = self._decode(self._window[-kept:])
            if len(text) >= rest and text and self._text.endswith(text):
                self._window = self._window[-kept:]
                self._text, self._given = text, len(text) - rest
                return
