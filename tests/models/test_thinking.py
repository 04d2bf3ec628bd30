"""Thoughts and answers in pieces against the whole of them."""

import re
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from pxd.models.chat import ChatTokenizer, OptionRefused
from pxd.models.thinking import KNOWN, Markers, Thoughts, markers_of
from pxd.serving.requests import Message

PLAIN_THINK = KNOWN[0]
HARMONY = next(markers for markers in KNOWN if markers.plain)

MARKER = re.compile(r"</?think>")

THINKING_TEMPLATE = (
    "{% for m in messages %}<|user|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>"
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n"
    "{% elif forced is defined %}{{ '<think>\n' * (forced + 0) }}{% endif %}{% endif %}"
)


def tokenizer_with(*special: str, template: str = THINKING_TEMPLATE) -> PreTrainedTokenizerFast:
    """Single bytes, and these as added tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_tokens([AddedToken(token, special=False) for token in special])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend)
    tokenizer.chat_template = template
    return tokenizer


def divide(markers: Markers | None, pieces: list[str], *, begun: bool = False) -> tuple[str, str]:
    thoughts = Thoughts(markers, begun=begun)
    parts = [*(thoughts.add(piece) for piece in pieces), thoughts.finish()]
    said_at = [place for place, (_, said) in enumerate(parts) if said]
    thought_at = [place for place, (thought, _) in enumerate(parts) if thought]
    assert not said_at or not thought_at or max(thought_at) <= min(said_at)
    return "".join(thought for thought, _ in parts), "".join(said for _, said in parts)


@pytest.mark.parametrize(
    ("text", "begun", "thought", "said"),
    [
        ("<think>\nTwo and two.\n</think>\n\nFour.", False, "Two and two.", "Four."),
        ("\n\n<think>a  b</think>c", False, "a  b", "c"),
        ("Two.\n</think>\n\nFour.\n", True, "Two.", "Four.\n"),
        ("<think>\n\n</think>\n\nFour.", False, "", "Four."),
        ("Four. <think>no</think>", False, "", "Four. <think>no</think>"),
        ("  Four.", False, "", "  Four."),
        ("<thi", False, "", "<thi"),
        ("<think>never ends </thi", False, "never ends </thi", ""),
        ("<think>a</think>b</think>c", False, "a", "b</think>c"),
        ("<think> \n", False, "", ""),
        ("", False, "", ""),
    ],
)
def test_what_is_thought_and_what_is_said(text: str, begun: bool, thought: str, said: str) -> None:
    assert divide(PLAIN_THINK, [text], begun=begun) == (thought, said)
    assert divide(PLAIN_THINK, list(text), begun=begun) == (thought, said)


def test_harmony_names_its_channels() -> None:
    analysis = "<|channel|>analysis<|message|>Hm.<|end|><|start|>assistant"
    final = "<|channel|>final<|message|>Four."
    assert divide(HARMONY, list(analysis + final)) == ("Hm.", "Four.")
    assert divide(HARMONY, list(final)) == ("", "Four.")
    assert divide(HARMONY, ["<|channel|>final"]) == ("", "<|channel|>final")


@given(
    st.lists(st.sampled_from(["<think>", "</think>", "<th", "ink>", "a", " ", "\n", "<"])),
    st.lists(st.integers(0, 60), max_size=8),
    st.booleans(),
)
def test_pieces_of_any_size_give_the_same(parts: list[str], places: list[int], begun: bool) -> None:
    text = "".join(parts)
    cuts = sorted({0, len(text), *(place % (len(text) + 1) for place in places)})
    pieces = [text[begin:end] for begin, end in pairwise(cuts)]
    whole = divide(PLAIN_THINK, [text], begun=begun)
    assert divide(PLAIN_THINK, pieces, begun=begun) == whole
    # Nothing is lost but markers and white space.
    kept = "".join(MARKER.sub("", part) for part in whole)
    assert "".join(kept.split()) == "".join(MARKER.sub("", text).split())


@given(st.text("<think>/ab \n"), st.text("<think>/ab \n"))
def test_without_markers_all_is_said_at_once(first: str, second: str) -> None:
    thoughts = Thoughts(None)
    assert thoughts.add(first) == ("", first)
    assert thoughts.add(second) == ("", second)
    assert thoughts.finish() == ("", "")


def test_a_model_thinks_if_its_tokenizer_has_the_markers() -> None:
    assert markers_of(tokenizer_with()) is None
    assert markers_of(tokenizer_with("<think>")) is None
    assert markers_of(tokenizer_with("<think>", "</think>")) == PLAIN_THINK
    harmony = ("<|channel|>", "<|message|>", "<|end|>", "<|start|>")
    assert markers_of(tokenizer_with(*harmony)) == HARMONY
    assert markers_of(tokenizer_with(*harmony[:3])) is None


def answer(tokenizer: ChatTokenizer, text: str, **options: object) -> tuple[str, str]:
    prompt = tokenizer.encode_chat((Message("user", text),), options)
    thoughts = tokenizer.thoughts(prompt)
    (thought, said), rest = thoughts.add("so</think>it is"), thoughts.finish()
    return thought + rest[0], said + rest[1]


def test_only_the_end_of_the_prompt_can_begin_thoughts() -> None:
    tokenizer = ChatTokenizer(tokenizer_with("<think>", "</think>"), ())
    assert answer(tokenizer, "go", forced=1) == ("so", "it is")
    assert answer(tokenizer, "go") == ("", "so</think>it is")
    assert answer(tokenizer, "go <think>") == ("", "so</think>it is")
    assert answer(tokenizer, "go", enable_thinking=False) == ("", "so</think>it is")


def test_options_reach_the_template_and_only_it() -> None:
    tokenizer = ChatTokenizer(tokenizer_with("<think>", "</think>"), ())
    chat = (Message("user", "go"),)
    plain = tokenizer.encode_chat(chat)
    assert tokenizer.encode_chat(chat, {"enable_thinking": True}) == plain
    assert len(tokenizer.encode_chat(chat, {"enable_thinking": False})) > len(plain)
    assert tokenizer.encode_chat(chat, {"nobody_knows_this": [1, {"a": None}]}) == plain


@pytest.mark.parametrize(
    "name",
    ["chat_template", "tokenize", "messages", "tools", "max_length", "return_tensors", "a-b", ""],
)
def test_options_cannot_take_the_template_over(name: str) -> None:
    tokenizer = ChatTokenizer(tokenizer_with(), ())
    with pytest.raises(OptionRefused, match="cannot be set by a request"):
        tokenizer.encode_chat((Message("user", "go"),), {name: "{{ 1 }}"})


def test_an_option_of_the_wrong_type_is_the_clients_fault() -> None:
    tokenizer = ChatTokenizer(tokenizer_with("<think>", "</think>"), ())
    with pytest.raises(OptionRefused, match="cannot use these options"):
        tokenizer.encode_chat((Message("user", "go"),), {"forced": "yes"})


def test_added_tokens_are_text_and_so_are_characters_of_many_bytes(tmp_path: Path) -> None:
    tokenizer = ChatTokenizer(tokenizer_with("<think>", "</think>", "<tool>"), ())
    text = "<think>Grüße 👩‍👩‍👧 an <tool> €</think>你好"
    ids = tokenizer._tokenizer.encode(text)
    detokenizer = tokenizer.detokenizer()
    pieces = [detokenizer.add([token]) for token in ids]
    assert "\N{REPLACEMENT CHARACTER}" not in "".join(pieces)
    whole = divide(PLAIN_THINK, [*pieces, detokenizer.finish()])
    assert whole == (
        "Grüße 👩‍👩‍👧 an <tool> €",
        "你好",
    )
    assert b"".join(tokenizer.piece(token) for token in ids).decode() == text
