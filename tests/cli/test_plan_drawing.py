"""What `pxd plan` shows to people, in a pipe and on a screen."""

import io
from collections.abc import Mapping

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pxd.cli.plan_plain import render
from pxd.cli.plan_report import (
    Candidate,
    Leftover,
    ModelFigures,
    NodeFigures,
    OneMore,
    PipelineFigures,
    Predicted,
    Report,
    Settings,
    Stage,
    StageTimes,
)
from pxd.cli.plan_screen import Screen
from pxd.cli.plan_words import milliseconds, tokens

NAMES = {"a": "anna", "b": "ben", "c": "carl"}
MACHINES = {"a": "rtx-4090", "b": "2x rtx-3090"}


def node(name: str, memory: float, used: float, layers: int) -> NodeFigures:
    ends = ("plain", "embed", "lm_head", "embed+lm_head")
    return NodeFigures(name, memory, memory * 0.75, memory * 0.2, used, dict.fromkeys(ends, layers))


def fitting() -> Report:
    figures = PipelineFigures(
        ttft_ms=1234.5,
        token_ms=33.21,
        tokens_per_s=345.6,
        requests=32,
        bottleneck="b",
        stages=[StageTimes("a", 12.3, 400.0, 0.51), StageTimes("b", 20.1, 800.0, 0.52)],
    )
    return Report(
        model=ModelFigures("big", 40, 38.25),
        settings=Settings("auto", 0.75, 0.2, 1024, 256),
        pipelines=[[Stage("a", 0, 10), Stage("b", 10, 40)]],
        leftovers=[Leftover("c", 0, 10)],
        predicted=Predicted(345.6, 345.6, [figures]),
        nodes=[node("a", 24, 14.2, 17), node("b", 48, 38.9, 35), node("c", 24, 0, 17)],
        one_more=OneMore(
            [
                Candidate("h100", None, True, 691.2, 345.6, None, 2),
                Candidate("", "c", True, 345.6, 0.0, None, 1),
            ]
        ),
        missing_gib=None,
        reason=None,
    )


def short() -> Report:
    return msgspec.structs.replace(
        fitting(),
        pipelines=[],
        leftovers=[Leftover(name, None, None) for name in "abc"],
        predicted=Predicted(0, 0, []),
        one_more=OneMore(
            [
                Candidate("h100", None, True, 500.0, 500.0, None, 2),
                Candidate("t4", None, False, 0, 0, 4.5, 0),
            ]
        ),
        missing_gib=20.5,
        reason="20.5 GiB are missing",
    )


def draw(
    report: Report,
    width: int,
    names: Mapping[str, str] = NAMES,
    machines: Mapping[str, str] = MACHINES,
) -> str:
    output = io.StringIO()
    console = Console(file=output, width=width, force_terminal=True, color_system=None)
    console.print(Screen(report, names, machines))
    return output.getvalue()


def test_a_plan_in_a_pipe() -> None:
    assert render(fitting(), NAMES).splitlines() == [
        "big: 40 layers, 38.2 GiB of weights",
        "strategy auto, weights 75% and KV 20% of memory, prompts of 1024 tokens",
        "1 pipeline, 346 tokens/s at most",
        "",
        "pipeline 1: 346 tokens/s with 32 requests at once; "
        "one request alone: first token after 1.23 s, then 33.2 ms per token",
        "NODE  LAYERS   MEMORY            TOKEN    PROMPT  HOP",
        "anna  [0,10)   14.2 of 24.0 GiB  12.3 ms  400 ms  0.51 ms",
        "ben   [10,40)  38.9 of 48.0 GiB  20.1 ms  800 ms  0.52 ms  bottleneck",
        "",
        "SPARE",
        "carl   can stand in for [0,10)",
        "",
        "ONE MORE MACHINE   WOULD CHANGE",
        "h100               691 tokens/s (+100%, 2 pipelines)",
        "another like carl  346 tokens/s (no more than now)",
    ]


def test_a_shortage_in_a_pipe() -> None:
    assert render(short(), NAMES).splitlines() == [
        "big: 40 layers, 38.2 GiB of weights",
        "strategy auto, weights 75% and KV 20% of memory, prompts of 1024 tokens",
        "no pipeline: 20.5 GiB are missing",
        "",
        "NODE  MEMORY    HOLDS AT MOST",
        "anna  24.0 GiB  17 layers",
        "ben   48.0 GiB  35 layers",
        "carl  24.0 GiB  17 layers",
        "",
        "ONE MORE MACHINE  WOULD CHANGE",
        "h100              fits, 500 tokens/s",
        "t4                still 4.5 GiB missing",
    ]


def test_a_plan_on_a_screen_of_80_columns() -> None:
    assert [line.rstrip() for line in draw(fitting(), 80).splitlines()] == [
        "pxd plan big  40 layers, 38.2 GiB of weights",
        "strategy auto, weights 75% and KV 20% of memory, prompts of 1024 tokens",
        "",
        "1 pipeline, 346 tokens/s at most",
        "",
        "pipeline 1  346 tokens/s with 32 requests at once",
        "  one request alone: first token after 1.23 s, then 33.2 ms per token",
        "  node  layers                          memory    token      hop",
        "  anna  ━━━───────────  [0,10)   14.2/24.0 GiB  12.3 ms  0.51 ms",
        "  ben   ───━━━━━━━━━━━  [10,40)  38.9/48.0 GiB  20.1 ms  0.52 ms  ◀ bottleneck",
        "",
        "spare",
        "  carl  can stand in for [0,10)",
        "",
        "one more machine",
        "  h100               691 tokens/s (+100%, 2 pipelines)",
        "  another like carl  346 tokens/s (no more than now)",
    ]


def test_a_wide_screen_shows_machines_and_the_prompt_too() -> None:
    text = draw(fitting(), 120)
    assert "2x rtx-3090" in text
    assert "800 ms" in text
    assert "━" * 20 in text, "what room is left goes to the bars"


def test_a_shortage_on_a_screen() -> None:
    text = draw(short(), 80)
    assert "✗ no pipeline: 20.5 GiB are missing" in text
    assert "17 of 40 layers" in text
    assert "still 4.5 GiB missing" in text


def test_colour_tells_nothing_that_words_do_not() -> None:
    """Where a node's layers are is told by the kind of line, the bottleneck by a word."""
    text = draw(fitting(), 80)
    assert "\x1b" not in text
    (slow,) = [line for line in text.splitlines() if "bottleneck" in line]
    assert slow.strip().startswith("ben   ───━━━")


def test_a_large_plan_is_cut_short_on_a_screen_only() -> None:
    one = fitting()
    many = msgspec.structs.replace(
        one,
        pipelines=one.pipelines * 50,
        leftovers=one.leftovers * 100,
        predicted=Predicted(1, 1, one.predicted.pipelines * 50),
    )
    text = draw(many, 80)
    assert "and 18 more pipelines; --json has them all" in text
    assert "and 36 more spares" in text
    assert "pipeline 50:" in render(many, NAMES)


@settings(deadline=None)
@given(
    st.integers(66, 200),
    st.dictionaries(st.sampled_from("abc"), st.text(max_size=80)),
    st.dictionaries(st.sampled_from("abc"), st.text(max_size=80)),
    st.sampled_from([fitting(), short()]),
)
def test_names_of_strangers_steer_no_terminal(
    width: int, names: dict[str, str], machines: dict[str, str], report: Report
) -> None:
    drawn = draw(report, width, names, machines)
    assert all(cell_len(line) <= width for line in drawn.splitlines())
    for text in (drawn, render(report, names)):
        assert all(c.isprintable() or c == "\n" for c in text)


@pytest.mark.parametrize(
    ("ms", "words"),
    [
        (0.0, "0.00 ms"),
        (0.456, "0.46 ms"),
        (9.96, "10.0 ms"),
        (99.4, "99.4 ms"),
        (123.4, "123 ms"),
        (1234.0, "1.23 s"),
        (12_345.0, "12 s"),
    ],
)
def test_times_have_three_digits_at_most(ms: float, words: str) -> None:
    assert milliseconds(ms) == words


def test_rates_have_as_many_digits_as_they_deserve() -> None:
    assert [tokens(rate) for rate in (1234.5, 99.94, 2.345, 0.0123)] == [
        "1234",
        "99.9",
        "2.3",
        "0.012",
    ]
