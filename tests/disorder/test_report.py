"""What scripts/chaos makes of what it saw."""

import msgspec
import pytest

from scripts.disorder.leaks import Holding, blocks, more, requests
from scripts.disorder.report import Report, Spread, lines, spread
from scripts.disorder.tally import Ending, Outcome, Tally, Waits, quantile


def ending(outcome: Outcome, why: str = "") -> Ending:
    return Ending(at=1.5, client=3, node="ann", question="why?", outcome=outcome, why=why)


NO_WAITS = Spread(count=0, p50=0, p99=0, longest=0)
CLEAN = Report(
    seed=7, minutes=1, nodes=4, clients=8, missing={}, faults=[], sent=10, finished=10, resumed=0,
    recoveries=0, elsewhere=0, errors={}, cuts={}, failed=[], wrong=[], lost=[], pauses=NO_WAITS,
    firsts=NO_WAITS, longest=[], longest_frozen=0, leaks=[], amiss="", fallen=[], failures=[],
)  # fmt: skip


@pytest.mark.parametrize(
    ("changes", "passed"),
    [
        ({}, True),
        ({"errors": {"503 not_ready": 3}, "cuts": {"gone": 1}, "resumed": 9}, True),
        ({"wrong": [ending("wrong")]}, False),
        ({"lost": [ending("lost")]}, False),
        ({"leaks": ["a process"]}, False),
        ({"amiss": "ann does not answer"}, False),
        ({"fallen": ["ann"]}, False),
        ({"failures": ["drain"]}, False),
    ],
)
def test_what_passes(changes: dict[str, object], passed: bool) -> None:
    assert msgspec.structs.replace(CLEAN, **changes).passed == passed


def test_all_that_was_wrong_is_told() -> None:
    report = msgspec.structs.replace(
        CLEAN,
        wrong=[ending("wrong", "x instead of y")],
        lost=[ending("lost", "no end")],
        errors={"503 not_ready": 2, "504 deadline_exceeded": 1},
        leaks=["process 7 belongs to no daemon"],
        missing={"disk": "no root"},
        amiss="bob is alone",
    )
    text = "\n".join(lines(report))
    for words in ("x instead of y", "no end", "3: 2 503 not_ready; 1 504", "process 7",
                  "disk: no root", "bob is alone"):  # fmt: skip
        assert words in text


def test_endings_are_counted_by_kind() -> None:
    tally = Tally()
    for each, waits in (
        (ending("finished"), Waits(first=0.5, pauses=[0.1, 3.0], longest_at=17.0)),
        (ending("finished"), Waits(first=0.5, pauses=[0.1])),
        (ending("finished"), Waits(first=0.5, pauses=[9.0], frozen=True)),
        (ending("error", "503 not_ready"), Waits()),
        (ending("cut", "gone"), Waits(pauses=[0.2])),
        (ending("lost", "no end"), Waits()),
    ):
        tally.add(each, waits, began=10.0)
    assert tally.outcomes == {"finished": 3, "error": 1, "cut": 1, "lost": 1}
    assert tally.errors == {"503 not_ready": 1}
    assert [each.why for each in tally.of("lost")] == ["no end"]
    assert [each.why for each in tally.of("error")] == ["503 not_ready"]
    assert tally.resumed == 1
    assert (max(tally.pauses), tally.longest_frozen) == (3.0, 9.0)
    assert [pause.seconds for pause in tally.longest] == [3.0, 0.2, 0.1, 0.0, 0.0]
    assert tally.longest[0].at == 7.0


def test_the_longest_pause_has_its_time() -> None:
    waits = Waits()
    for seconds, now in ((1.0, 5.0), (4.0, 9.0), (2.0, 11.0)):
        waits.pause(seconds, now)
    assert (waits.longest, waits.longest_at) == (4.0, 9.0)


def test_quantiles() -> None:
    values = [float(n) for n in range(100, 0, -1)]
    assert (quantile(values, 0.5), quantile(values, 0.99), quantile([], 0.5)) == (51, 100, 0)
    assert spread(values).longest == 100


def test_leaks_are_what_is_too_much() -> None:
    before = Holding(descriptors=40, threads=10, kinds={"socket": 20, "pipe": 20})
    as_before = Holding(descriptors=44, threads=12, kinds={"socket": 24, "pipe": 20})
    leaking = Holding(descriptors=140, threads=60, kinds={"socket": 19, "pipe": 121})
    assert more("ann", before, as_before) == []
    [descriptors, threads] = more("ann", before, leaking)
    assert "100 file descriptors" in descriptors
    assert "101 pipe" in descriptors
    assert "socket" not in descriptors
    assert "50 threads" in threads
    nodes = [
        {"name": "ann", "running": 0, "waiting": 0},
        {"name": "bob", "running": 2, "waiting": 1},
    ]
    [held] = requests("ann", {"nodes": nodes})
    assert "bob holds 2 running and 1 waiting" in held


def test_kv_blocks_that_are_not_back_are_leaks() -> None:
    held, none = ({"start": 0, "end": 4, "kv_held": count} for count in (7, 0))
    nodes = [{"name": "ann", "stages": [none]}, {"name": "bob", "stages": [none, held]}]
    all_back, one_out, unknown = (
        {"total": total, "free": free} for total, free in ((9, 9), (9, 8), (0, 0))
    )
    models = [{"name": "demo", "kv": [all_back, one_out, unknown]}]
    [stage, second, third] = blocks("ann", {"nodes": nodes, "models": models})
    assert "bob holds 7 KV blocks of [0,4)" in stage
    assert "pipeline 2 of demo has 8 free KV blocks of 9" in second
    assert "pipeline 3" in third
    assert blocks("ann", {"nodes": nodes[:1], "models": [{"name": "demo", "kv": [all_back]}]}) == []
