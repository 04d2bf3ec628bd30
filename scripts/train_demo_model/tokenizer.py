"""The demo model's tokenizer: bytes, plus one token per word of the tasks.

It is a byte-level BPE without merges but with ``ignore_merges``: a pre-token that
is in the vocabulary becomes one token, every other one falls back to its bytes.
Thus common words (with their leading space) are single tokens, while words to be
spelled or reversed, and digits, stay single characters.  As the pre-tokenizer
loses nothing and there is no normaliser, decoding gives the text back exactly.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from random import Random

from tasks import Message, vocabulary_sample
from texts import COMMON_WORDS
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers

END, SYSTEM, USER, ASSISTANT = "<|end|>", "<|system|>", "<|user|>", "<|assistant|>"

CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- set role = 'system' if message['role'] == 'developer' else message['role'] -%}"
    "{%- if role not in ('system', 'user', 'assistant') -%}"
    "{{ raise_exception('Unknown message role: ' + role) }}"
    "{%- endif -%}"
    "<|{{ role }}|>{{ message['content'] | trim }}<|end|>"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}<|assistant|>{%- endif -%}"
)

#: Digits alone, words with their leading space, runs of punctuation one by one, white space.
PRE_TOKEN = r"\p{N}| ?\p{L}+|[^\s\p{L}\p{N}]|\s"


def render(messages: list[Message]) -> str:
    """A conversation as the chat template renders it, without the Jinja interpreter."""
    roles = {"system": SYSTEM, "user": USER, "assistant": ASSISTANT}
    return "".join(f"{roles[m.role]}{m.content.strip()}{END}" for m in messages)


def pre_tokenizer() -> pre_tokenizers.PreTokenizer:
    """Split into pre-tokens, then map bytes to printable characters."""
    return pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKEN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )


def task_words(seed: int = 0, samples: int = 30_000, min_count: int = 20) -> list[str]:
    """The pre-tokens of two and more letters that occur often, except words to be spelled."""
    splitter, counts = pre_tokenizer(), Counter[str]()
    for text in vocabulary_sample(Random(seed), samples):
        counts.update(piece for piece, _ in splitter.pre_tokenize_str(text))
    spelled = set(COMMON_WORDS)
    words = (
        word
        for word, count in counts.items()
        if count >= min_count
        and len(word.lstrip("Ġ")) > 1
        # Random letters and spelled words (also in upper case or capitalised) stay characters.
        and word.lstrip("Ġ").lower() not in spelled
    )
    return sorted(words)


def build_tokenizer() -> Tokenizer:
    """The tokenizer, a pure function of the tasks."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *task_words()])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(token, special=True) for token in (END, SYSTEM, USER, ASSISTANT)]
    )
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, out: Path, max_length: int) -> None:
    """Write the tokenizer files of a Hugging Face checkpoint."""
    tokenizer.save(str(out / "tokenizer.json"))
    config = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": END,
        "pad_token": END,
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n")
