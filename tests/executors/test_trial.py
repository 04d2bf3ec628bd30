"""What is tried out with a loaded stage, on one that computes next to nothing."""

from typing import Any, cast

import mlx.core as mx
import pytest

from pxd.executors.mlx.stage import Stage
from pxd.executors.mlx.trial import supports_guesses

VOCABULARY = 8


class Counting:
    """Tells tokens by their number. `wrong` is added where one pass has several positions."""

    first = True
    vocabulary = VOCABULARY

    def __init__(self, barred: float, wrong: float) -> None:
        self.barred, self.wrong = barred, wrong

    def make_caches(self) -> list[Any]:
        return []

    def forward(self, inputs: mx.array, caches: list[Any]) -> mx.array:
        logits = inputs[..., None] * mx.arange(float(VOCABULARY))
        if inputs.shape[1] > 1:
            logits = logits + self.wrong
        return mx.where(mx.arange(VOCABULARY) == 3, self.barred, logits)


@pytest.mark.parametrize("barred", [0.0, -mx.inf])
@pytest.mark.parametrize(("wrong", "expected"), [(0.0, True), (1.0, False)])
def test_whether_several_positions_may_be_guessed_is_tried_where_tokens_are_barred_too(
    barred: float, wrong: float, expected: bool
) -> None:
    stage = cast(Stage, Counting(barred, wrong))
    assert supports_guesses(stage, mx.float32) == expected


def test_broken_weights_say_nothing_about_guesses() -> None:
    assert supports_guesses(cast(Stage, Counting(mx.nan, 1.0)), mx.float32)
