"""What bytes a single token stands for, where decoding it alone would show half a character."""

import json
import re
from typing import Any

_BYTE = re.compile(r"<0x([0-9A-F]{2})>")
_SPACE = "\N{LOWER ONE EIGHTH BLOCK}"


def _bytes_of_characters() -> dict[str, int]:
    """GPT-2's alphabet: bytes that can be printed are themselves, the others follow from U+0100."""
    printed = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {
        chr(0x100 + place): byte for place, byte in enumerate(hidden)
    }


_BYTES = _bytes_of_characters()


class Pieces:
    """The tokens of one tokenizer of transformers."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._added = {int(token) for token in tokenizer.added_tokens_decoder}
        self._decoders = _decoders(tokenizer)

    def name(self, token: int) -> str | None:
        """The token as its tokenizer writes it; None where there is no such id."""
        try:
            name: str | None = self._tokenizer.convert_ids_to_tokens(token)
        except (IndexError, KeyError, OverflowError):
            return None
        return name

    def of(self, token: int) -> bytes:
        """The bytes it adds to a text in whose middle it is; none for an unknown id."""
        name = self.name(token)
        if name is None:
            return b""
        if token in self._added:
            return name.encode()
        if "ByteLevel" in self._decoders and all(character in _BYTES for character in name):
            return bytes(_BYTES[character] for character in name)
        if "ByteFallback" in self._decoders and (found := _BYTE.fullmatch(name)):
            return bytes([int(found[1], 16)])
        if _SPACE in name:
            return name.replace(_SPACE, " ").encode()
        text: str = self._tokenizer.decode([token], clean_up_tokenization_spaces=False)
        return text.encode()


def _decoders(tokenizer: Any) -> set[str]:
    """The kinds of decoders that a tokenizer joins tokens with; empty where it is no fast one."""
    decoder = getattr(getattr(tokenizer, "backend_tokenizer", None), "decoder", None)
    if decoder is None:
        return set()
    state = json.loads(decoder.__getstate__())
    return {part["type"] for part in (state, *state.get("decoders", ()))}
