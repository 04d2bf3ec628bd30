"""The bytes of single tokens, put together, are the text of all of them."""

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from pxd.models.pieces import Pieces

from .test_detokenizer import BYTE_LEVEL, PIECES, decode_with, whole_characters


def pieces_of(tokenizer: Tokenizer) -> Pieces:
    return Pieces(PreTrainedTokenizerFast(tokenizer_object=tokenizer))


BYTES, SENTENCES = pieces_of(BYTE_LEVEL), pieces_of(PIECES)


@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=40))
def test_byte_level(ids: list[int]) -> None:
    joined = b"".join(BYTES.of(token) for token in ids)
    assert joined.decode("utf-8", "replace") == decode_with(BYTE_LEVEL, ids)


@given(st.lists(whole_characters, max_size=20))
def test_sentence_pieces(parts: list[list[int]]) -> None:
    """Of the first space they say what it is in the middle of a text."""
    ids = [token for part in parts for token in part]
    joined = b"".join(SENTENCES.of(token) for token in ids).decode()
    assert joined.removeprefix(" ") == decode_with(PIECES, ids)


@pytest.mark.parametrize(("token", "expected"), [("é", "é"), ("<0xE2>", b"\xe2"), ("▁", " ")])
def test_single_pieces(token: str, expected: str | bytes) -> None:
    found = SENTENCES.of(PIECES.token_to_id(token))
    assert found == (expected.encode() if isinstance(expected, str) else expected)


def test_other_decoders_and_added_tokens() -> None:
    tokenizer = Tokenizer(models.WordLevel({"[UNK]": 0, "play": 1, "##ing": 2}, "[UNK]"))
    tokenizer.decoder = decoders.WordPiece()
    tokenizer.add_special_tokens(["<end▁of turn>"])
    pieces = pieces_of(tokenizer)
    assert pieces.of(1) == b"play"
    assert pieces.of(3) == "<end▁of turn>".encode()


@pytest.mark.parametrize("token", [1 << 31, 1 << 40, 263])
def test_an_unknown_id_has_no_name_and_no_bytes(token: int) -> None:
    known = BYTE_LEVEL.get_vocab_size()
    assert BYTES.name(known - 1) is not None
    assert BYTES.name(max(token, known)) is None
    assert BYTES.of(max(token, known)) == b""
