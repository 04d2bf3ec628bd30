"""What scripts/bench makes of its samples."""

from collections.abc import Callable

import pytest
from transformers import PreTrainedTokenizerFast

from scripts.benchmarks import models
from scripts.benchmarks.bench import alternate, prompts
from scripts.benchmarks.load import Result, Stream
from scripts.benchmarks.nodes import split_options
from scripts.benchmarks.report import FLOORS, Floor, Row, compare, floor_lines, lines, number


def row(key: str, *ours: float, ratios: tuple[float, ...] = ()) -> Row:
    return Row(section="one", key=key, what=key, unit="ms", ours=ours, ratios=ratios)


def test_ratios_compare_samples_of_one_round_and_more_than_1_is_better() -> None:
    times = compare("one", "k", "w", "ms", [10, 20], [20, 10], more_is_better=False)
    rates = compare("one", "k", "w", "tokens/s", [10, 20], [20, 10], more_is_better=True)
    assert times.ratios == (2.0, 0.5)
    assert rates.ratios == (0.5, 2.0)


def test_series_of_unequal_length_are_refused() -> None:
    with pytest.raises(ValueError):
        compare("one", "k", "w", "ms", [1.0], [1.0, 2.0], more_is_better=True)


@pytest.mark.parametrize(
    ("floor", "found", "verdict"),
    [
        (Floor(what="w", key="k", least=1.2), row("k", 9, ratios=(1.0, 1.2, 5.0)), "ok"),
        (Floor(what="w", key="k", least=1.2), row("k", 9, ratios=(1.0, 1.1, 5.0)), "below"),
        (Floor(what="w", key="k", most=2.0), row("k", 1.0, 2.0, 9.0), "ok"),
        (Floor(what="w", key="k", most=2.0), row("k", 1.0, 2.1, 9.0), "below"),
        (Floor(what="w", key="k", most=2.0), row("k", -0.5), "ok"),
        (Floor(what="w", key="k", most=2.0), row("other", 1.0), "not measured"),
    ],
)
def test_a_floor_judges_the_median(floor: Floor, found: Row, verdict: str) -> None:
    assert floor.verdict([found]) == verdict


def test_each_floor_has_a_line_with_what_was_measured() -> None:
    shown = floor_lines([row("head.64", 0.4, 0.5, 0.6)])
    assert len(shown) == len(FLOORS) == 8
    (head,) = [line for line in shown if line.lstrip().startswith("head")]
    assert head.split()[-6:] == ["≤", "1", "ms", "0.50", "ms", "ok"]
    assert sum("not measured" in line for line in shown) == 7


def test_the_table_shows_medians_and_extremes() -> None:
    compared = compare("one", "k", "per token", "ms", [10, 30, 20], [40, 30, 40],
                       more_is_better=False)  # fmt: skip
    (line,) = lines([compared])
    assert line.split() == ["per", "token", "20.0", "vs", "40.0", "ms", "2.00x",
                            "1.00", "to", "4.00"]  # fmt: skip


@pytest.mark.parametrize(
    ("value", "shown"),
    [(0, "0"), (0.123, "0.12"), (1.5, "1.50"), (12.34, "12.3"), (1234.5, "1,234"), (-3, "-3.00")],
)
def test_numbers_have_no_more_digits_than_they_deserve(value: float, shown: str) -> None:
    assert number(value) == shown


def test_sides_take_turns() -> None:
    turns: list[tuple[str, int]] = []

    def side(name: str) -> Callable[[int], int]:
        def take(number: int) -> int:
            turns.append((name, number))
            return number

        return take

    samples = alternate(2, side("a"), side("b"))
    assert turns == [("a", 0), ("b", 0), ("a", 1), ("b", 1)]
    assert samples == [[0, 1], [0, 1]]


def test_a_load_is_summed_up() -> None:
    first = Stream(first=0.1, last=1.1, tokens=11, prompt_tokens=8)
    second = Stream(first=0.3, last=2.3, tokens=11, prompt_tokens=8)
    third = Stream(first=0.2, last=1.7, tokens=11, prompt_tokens=8)
    result = Result((first, second, third))
    assert result.ttft_s == 0.2
    assert result.token_s == pytest.approx(0.15)
    assert result.tokens_per_s == pytest.approx(33 / 2.3)


def test_prompts_have_the_length_asked_for_and_are_the_same_for_all_sides() -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(models.DEMO)
    asked = prompts("key", 3, 2, 50)
    assert asked == prompts("key", 3, 2, 50)
    assert len({*asked, *prompts("key", 4, 2, 50)}) == 4
    for text in asked:
        message = [{"role": "user", "content": text}]
        ids = tokenizer.apply_chat_template(message, add_generation_prompt=True, return_dict=False)
        assert len(ids) == 50


@pytest.mark.parametrize(
    ("layers", "nodes", "most"), [(8, 2, 7), (8, 3, 3), (12, 3, 5), (28, 2, 27)]
)
def test_a_model_is_split_over_as_many_nodes_as_asked_for(
    layers: int, nodes: int, most: int
) -> None:
    *_, given = split_options(models.DEMO, layers, nodes)
    assert int(given) == most
    assert nodes * most >= layers > (nodes - 1) * most
