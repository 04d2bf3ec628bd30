"""What `coding_effect` measures stays what it is said to be."""

from collections.abc import Sequence

import pytest

from pxd.models.catalog import DEMO_DIRECTORY
from pxd.models.chat import ChatTokenizer
from pxd.serving.requests import Message
from pxd.wire import Coding
from tests.executors.coding_effect import effect, load_stages, logits

ANSWERED = {
    "What is 12 plus 30?": "42",
    "What is the capital of France?": "Paris",
    "Spell rocket.": "R O C K E T",
    "What day comes after Monday?": "Tuesday",
}


def texts() -> list[list[int]]:
    tokenizer = ChatTokenizer.load(DEMO_DIRECTORY)
    whole = (
        (Message("user", question), Message("assistant", answer))
        for question, answer in ANSWERED.items()
    )
    return [tokenizer.encode_chat(messages) for messages in whole]


@pytest.mark.parametrize("cuts", [(4,), (3, 6)])
def test_the_demo_models_logits_hardly_change(cuts: Sequence[int]) -> None:
    stages = load_stages(DEMO_DIRECTORY, cuts)
    exact = logits(stages, texts(), None)
    codings: tuple[Coding, ...] = ("fp8", "int8")
    for coding in codings:
        found = effect(exact, logits(stages, texts(), coding))
        assert 0 < found.divergence < 0.01, coding
        assert found.agreement > 0.9, coding
        assert found.worst < 0.5 * found.deviation, coding
