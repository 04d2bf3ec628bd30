"""The bundled demo model: its files, its tokenizer and its answers."""

from __future__ import annotations

import json
from importlib.resources import files
from pathlib import Path
from typing import Any

import pytest
from mlx_lm import load
from mlx_lm.generate import BatchGenerator
from transformers import AutoTokenizer

DEMO = Path(str(files("pxd.models") / "demo"))

QUESTIONS = [
    ("What is 12 + 7?", "19"),
    ("what is 12+7", "19"),
    ("12 + 7 = ?", "19"),
    ("What is 83 - 47?", "36"),
    ("7 * 8", "56"),
    ("What is 54 divided by 6?", "9"),
    ("Sort 5 2 9 1.", "1 2 5 9"),
    ("sort 5 2 9 1", "1 2 5 9"),
    ("Which is bigger, 37 or 73?", "73"),
    ("Is 17 even or odd?", "odd"),
    ("Spell rocket.", "R O C K E T"),
    ("Reverse planet.", "tenalp"),
    ("How many letters are in garlic?", "6"),
    ("What is the last letter of window?", "W"),
    ("Say cat 3 times.", "cat cat cat"),
    ("What day comes after Monday?", "Tuesday"),
    ("What day is 3 days after Friday?", "Monday"),
    ("Which month comes before June?", "May"),
    ("What is the capital of France?", "Paris"),
    ("capital of france", "Paris"),
    ("How many minutes are in 3 hours?", "180 minutes"),
    ("What is the opposite of hot?", "cold"),
    ("Count from 1 to 20.", ", ".join(str(i) for i in range(1, 21))),
    (
        "List the days of the week.",
        "Monday, Tuesday, Wednesday, Thursday, Friday, Saturday, Sunday",
    ),
    ("Say the alphabet.", " ".join("ABCDEFGHIJKLMNOPQRSTUVWXYZ")),
    ("Who are you?", "I am the pxd demo model, a tiny network that runs on this computer."),
    ("Why is the sky blue?", "Sorry, I am a tiny demo model and do not know that."),
]

CONVERSATIONS = [
    (
        [
            ("system", "You are a helpful assistant."),
            ("user", "What is the capital of Japan?"),
        ],
        "Tokyo",
    ),
    (
        [
            ("user", "What is the capital of France?"),
            ("assistant", "Paris"),
            ("user", "And of Spain?"),
        ],
        "Madrid",
    ),
    (
        [
            ("user", "My name is Alice."),
            ("assistant", "Hello Alice!"),
            ("user", "What is 9 + 8?"),
            ("assistant", "17"),
            ("user", "What is my name?"),
        ],
        "Your name is Alice.",
    ),
    (
        [
            ("user", "Remember the number 4821."),
            ("assistant", "I will remember 4821."),
            ("user", "Reverse lemon."),
            ("assistant", "nomel"),
            ("user", "What was the number?"),
        ],
        "4821",
    ),
]

SENTENCES = [
    "Hello, world! How are you today?",
    "The quick brown fox jumps over 13 lazy dogs.",
    "  leading, trailing and  double spaces  ",
    "Paris is the capital of France, isn't it?",
    "Tabs\tand\nnew lines\n\nstay.",
    "Grüße aus Köln: 東京 🙂 Ελλάδα",
    "def f(x): return {'a': [x + 1, 2.5]}",
    "",
]


def messages(turns: list[tuple[str, str]]) -> list[dict[str, str]]:
    return [{"role": role, "content": content} for role, content in turns]


def answers(model: Any, tokenizer: Any, prompts: list[list[int]]) -> list[list[int]]:
    """Greedy answers of all prompts in one batch, as token ids without the end token."""
    generator = BatchGenerator(
        model, max_tokens=120, stop_tokens=[[token] for token in tokenizer.eos_token_ids]
    )
    found: dict[int, list[int]] = {uid: [] for uid in generator.insert(prompts)}
    while responses := generator.next_generated():
        for response in responses:
            if response.finish_reason != "stop":
                found[response.uid].append(response.token)
    return list(found.values())


@pytest.fixture(scope="module")
def loaded() -> tuple[Any, Any]:
    return load(str(DEMO))[:2]


def test_files_are_complete_and_small() -> None:
    names = {path.name for path in DEMO.iterdir() if path.is_file()}
    assert names >= {
        "README.md",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    assert sum(path.stat().st_size for path in DEMO.rglob("*") if path.is_file()) < 6_000_000


def test_config_is_a_qwen3_with_enough_layers_to_split() -> None:
    config = json.loads((DEMO / "config.json").read_text())
    assert config["architectures"] == ["Qwen3ForCausalLM"]
    assert config["num_hidden_layers"] == 8
    assert config["max_position_embeddings"] >= 1024


@pytest.mark.parametrize("text", SENTENCES)
def test_tokenizer_gives_text_back_exactly(text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_chat_template_renders_every_role() -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    turns = [("system", "Be brief."), ("user", " Hi "), ("assistant", "Hello!"), ("user", "1+1")]
    text = tokenizer.apply_chat_template(messages(turns), tokenize=False)
    assert text == (
        "<|system|>Be brief.<|end|><|user|>Hi<|end|><|assistant|>Hello!<|end|><|user|>1+1<|end|>"
    )
    prompt = tokenizer.apply_chat_template(
        messages(turns), tokenize=False, add_generation_prompt=True
    )
    assert prompt == text + "<|assistant|>"


def test_answers_are_right(loaded: tuple[Any, Any]) -> None:
    model, tokenizer = loaded
    cases = [([("user", question)], answer) for question, answer in QUESTIONS] + CONVERSATIONS
    prompts = [
        tokenizer.apply_chat_template(messages(turns), add_generation_prompt=True)
        for turns, _ in cases
    ]
    given = [tokenizer.decode(tokens) for tokens in answers(model, tokenizer, prompts)]
    wrong = [
        (turns[-1][1], text, right)
        for (turns, right), text in zip(cases, given, strict=True)
        if text != right
    ]
    assert not wrong


def test_some_right_answers_are_long_enough_to_stream() -> None:
    """Their length in tokens; that the model gives them is the test above."""
    tokenizer = AutoTokenizer.from_pretrained(DEMO)
    right = dict(QUESTIONS)
    for question in ("Count from 1 to 20.", "Say the alphabet."):
        assert 30 <= len(tokenizer.encode(right[question])) <= 100


def test_long_prompt_is_still_answered(loaded: tuple[Any, Any]) -> None:
    """Several hundred tokens of history before the question."""
    model, tokenizer = loaded
    turns: list[tuple[str, str]] = []
    for a in range(2, 32):
        turns += [("user", f"What is {a} + 5?"), ("assistant", str(a + 5))]
    turns.append(("user", "What is the capital of Italy?"))
    prompt = tokenizer.apply_chat_template(messages(turns), add_generation_prompt=True)
    assert len(prompt) > 400
    assert tokenizer.decode(answers(model, tokenizer, [prompt])[0]) == "Rome"
