"""Streaming detokenisation against decoding everything at once."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from pxd.models.chat import ChatTokenizer
from pxd.models.detokenizer import WINDOW_TOKENS, Detokenizer
from pxd.models.errors import ModelError
from tests.models.files import write_model


def byte_level() -> Tokenizer:
    """Every byte is a token, as are a few longer pieces."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, "Ġthe", "Ġ.", "Hello", "ĠĠ", "âĤ", "¬"]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(dict.fromkeys(pieces))}))
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer


def sentence_pieces() -> Tokenizer:
    """As Llama 2 has it: ``▁`` for spaces, the first one dropped, bytes for rare characters."""
    pieces = [
        "<unk>",
        *(f"<0x{i:02X}>" for i in range(256)),
        "▁",
        "▁Hello",
        "▁world",
        "lo",
        ".",
        "é",
    ]
    tokenizer = Tokenizer(models.WordLevel({p: i for i, p in enumerate(pieces)}, unk_token="<unk>"))
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


BYTE_LEVEL, PIECES = byte_level(), sentence_pieces()


def decode_with(tokenizer: Tokenizer, ids: list[int]) -> str:
    text: str = tokenizer.decode(ids, skip_special_tokens=False)
    return text


def stream(tokenizer: Tokenizer, ids: list[int], sizes: list[int]) -> list[str]:
    detokenizer = Detokenizer(lambda window: decode_with(tokenizer, window))
    pieces, begin = [], 0
    for size in [*sizes, *[1] * len(ids)]:
        pieces.append(detokenizer.add(ids[begin : begin + size]))
        begin += size
    return [*pieces, detokenizer.finish()]


portions = st.lists(st.integers(0, 20), max_size=10)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.integers(0, BYTE_LEVEL.get_vocab_size() - 1), max_size=120), portions)
def test_any_bytes_even_invalid_ones_equal_decoding_at_once(
    ids: list[int], sizes: list[int]
) -> None:
    assert "".join(stream(BYTE_LEVEL, ids, sizes)) == decode_with(BYTE_LEVEL, ids)


whole_characters = st.one_of(
    st.sampled_from(["▁", "▁Hello", "▁world", "lo", ".", "é"]).map(
        lambda piece: [PIECES.token_to_id(piece)]
    ),
    st.characters(codec="utf-8", exclude_characters="\N{REPLACEMENT CHARACTER}").map(
        lambda c: [PIECES.token_to_id(f"<0x{byte:02X}>") for byte in c.encode()]
    ),
)


@settings(max_examples=200, deadline=None)
@given(st.lists(whole_characters, max_size=60), portions)
def test_sentence_pieces_with_byte_fallback_equal_decoding_at_once(
    parts: list[list[int]], sizes: list[int]
) -> None:
    ids = [token for part in parts for token in part]
    assert "".join(stream(PIECES, ids, sizes)) == decode_with(PIECES, ids)


def test_an_unfinished_character_is_held_back() -> None:
    ids = [BYTE_LEVEL.token_to_id(c) for c in ["H", "âĤ", "¬", "H"]]
    assert stream(BYTE_LEVEL, ids, []) == ["H", "", "€", "H", ""]
    assert stream(BYTE_LEVEL, ids[:2], []) == ["H", "", "\N{REPLACEMENT CHARACTER}"]


@pytest.mark.parametrize("token", ["H", "Ã"])
def test_the_cost_per_token_does_not_grow(token: str) -> None:
    """The second token is an endless row of unfinished characters."""
    decoded: list[int] = []

    def decode(ids: list[int]) -> str:
        decoded.append(len(ids))
        return decode_with(BYTE_LEVEL, ids)

    detokenizer = Detokenizer(decode)
    for _ in range(1000):
        detokenizer.add([BYTE_LEVEL.token_to_id(token)])
    assert max(decoded) <= WINDOW_TOKENS + 1
    assert sum(decoded) < 1000 * (WINDOW_TOKENS + 1)


def test_a_tokenizer_that_cannot_be_loaded_is_a_model_error(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="tokenizer"):
        ChatTokenizer.load(write_model(tmp_path))
