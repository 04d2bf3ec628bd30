"""Token ids to text, piece by piece, at a bounded cost per token."""

from collections.abc import Callable, Sequence

REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
# An unfinished UTF-8 character is at most three bytes long.
MAX_UNFINISHED = 3
WINDOW_TOKENS = 32
KEPT_TOKENS = 8


class Detokenizer:
    """Turns one growing sequence of ids into text that never needs taking back.

    Decoders look at neighbours (leading spaces, bytes of one character), so ids cannot be decoded
    one by one. Instead a window of the last ids is decoded again with each addition, as in the
    prefix and read offsets of text-generation-inference and vLLM. Pieces concatenated equal
    ``decode(all ids)``, for decoders where ids further back than the window have no influence.
    """

    def __init__(self, decode: Callable[[list[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._text = ""
        self._given = 0

    def add(self, ids: Sequence[int]) -> str:
        """Return the text that is now certain; empty while a character is unfinished."""
        piece = []
        # In bounded portions, or a long addition would make a long window.
        for begin in range(0, len(ids), KEPT_TOKENS):
            self._window.extend(ids[begin : begin + KEPT_TOKENS])
            self._text = self._decode(self._window)
            piece.append(self._take(len(self._text) - self._unfinished()))
            if len(self._window) > WINDOW_TOKENS:
                self._shorten()
        return "".join(piece)

    def finish(self) -> str:
        """Return the rest; no ids come after this."""
        return self._take(len(self._text))

    def _unfinished(self) -> int:
        tail = self._text[-MAX_UNFINISHED:]
        return len(tail) - len(tail.rstrip(REPLACEMENT))

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
