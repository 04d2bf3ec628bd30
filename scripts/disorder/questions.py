"""What the clients ask, and what an answer must be."""

from typing import Any

import msgspec

SHORT = (
    "What is 17 + 25?",
    "What is the capital of Norway?",
    "Sort 5 2 9 1.",
    "Spell table.",
)
LONG = ("Count from 1 to 20.", "Say the alphabet.", "List the months.", "Tell me a story.")
SHORT_TOKENS = 30
LONG_TOKENS = 120
SEEDED_TOKENS = 240
TIMEOUT_S = 60.0


class Question(msgspec.Struct, frozen=True, kw_only=True):
    """With a `seed` it is sampled, and does not end before `tokens`; else it is greedy.

    Within `timeout` seconds the cluster has to answer, or to say that it cannot.
    """

    text: str
    tokens: int
    seed: int | None = None
    user: str = ""
    timeout: float = TIMEOUT_S

    def body(self) -> dict[str, Any]:
        body = {
            "model": "demo",
            "messages": [{"role": "user", "content": self.text}],
            "max_tokens": self.tokens,
            "timeout": self.timeout,
            "stream": True,
            "stream_options": {"include_usage": True},
            "user": self.user,
        }
        if self.seed is None:
            return body | {"temperature": 0}
        return body | {"temperature": 1, "seed": self.seed, "min_tokens": self.tokens}


class Answer(msgspec.Struct, frozen=True, kw_only=True):
    text: str
    tokens: int
    finish: str


def questions() -> list[Question]:
    short = [Question(text=text, tokens=SHORT_TOKENS) for text in SHORT]
    long = [Question(text=text, tokens=LONG_TOKENS) for text in LONG]
    seeded = [
        Question(text=text, tokens=SEEDED_TOKENS, seed=seed) for seed, text in enumerate(LONG)
    ]
    return [*short, *long, *seeded]
