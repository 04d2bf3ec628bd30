"""What scripts/kills makes of what clients saw and of what daemons logged."""

import random
from datetime import datetime

import msgspec
import pytest

from scripts.disorder.pauses import Death, Pause, Told, pause
from scripts.disorder.tally import Outcome, Story
from scripts.disorder.toll import SLACK_S, lines, toll
from scripts.disorder.victims import KINDS, LAYOUTS, Kind, choose, victims

STORY = Story(
    id="chatcmpl-aa",
    node="ann",
    sent=8.0,
    ended=20.0,
    timeout=60.0,
    gaps=[(8.0, 8.5), (9.0, 12.0)],
    outcome="finished",
    why="",
)
DEATH = Death(node="bob", at=10.0, detectable=10.5, over=16.0)


def stamp(seconds: float) -> str:
    return datetime.fromtimestamp(seconds).isoformat(" ", "milliseconds")


def log(*lines: tuple[float, str]) -> Told:
    return Told.of(["\n".join(f"{stamp(at)} WARNING pxd.x: {words}" for at, words in lines)])


RESUMED = log(
    (10.7, "request aa goes on after a failure (silence: bob does not answer)"),
    (11.0, "request aa is on pipeline 17 now"),
    (11.5, "request bb is on pipeline 17 now"),
)


def test_a_pause_is_what_comes_after_the_death_could_be_known() -> None:
    found = pause(STORY, DEATH, RESUMED, 0.0)
    assert found is not None
    assert found.resumed
    assert found.seconds == pytest.approx(1.5)
    parts = (found.noticed, found.placed, found.first)
    assert parts == pytest.approx((0.2, 0.3, 1.0), abs=0.002)


def test_clients_and_daemons_may_have_other_clocks() -> None:
    earlier = msgspec.structs.replace(
        STORY, sent=-92.0, ended=-80.0, gaps=[(b - 100, e - 100) for b, e in STORY.gaps]
    )
    assert pause(earlier, DEATH, RESUMED, 100.0) == pause(STORY, DEATH, RESUMED, 0.0)


def test_who_was_befallen_by_nothing_only_waited() -> None:
    other = msgspec.structs.replace(STORY, id="chatcmpl-cc")
    assert pause(other, DEATH, RESUMED, 0.0) == Pause(seconds=1.5)
    assert pause(msgspec.structs.replace(other, gaps=[]), DEATH, RESUMED, 0.0) == Pause(seconds=0.0)
    before = msgspec.structs.replace(other, gaps=[(8.0, 9.9)])
    assert pause(before, DEATH, RESUMED, 0.0) == Pause(seconds=0.0)


@pytest.mark.parametrize(("sent", "ended"), [(1.0, 9.0), (17.0, 19.0)])
def test_who_was_not_there_has_no_pause(sent: float, ended: float) -> None:
    away = msgspec.structs.replace(STORY, sent=sent, ended=ended)
    assert pause(away, DEATH, RESUMED, 0.0) is None


def test_suspicions_are_read_from_logs() -> None:
    told = log((3.25, "bob (12D3) does not answer"), (4.0, "bob (12D3) answers again"))
    assert dict(told.suspected) == {"12D3": [pytest.approx(3.25, abs=0.002)]}
    assert not told.noticed
    assert not told.placed


def ended(outcome: Outcome, why: str = "", **changes: object) -> Story:
    return msgspec.structs.replace(STORY, outcome=outcome, why=why, **changes)


@pytest.mark.parametrize(
    ("kind", "story", "bad"),
    [
        ("head", ended("finished"), False),
        ("head", ended("cut", "its own node went"), False),
        ("head", ended("lost", "no end"), True),
        ("head", ended("wrong", "x instead of y"), True),
        ("head", ended("error", "503 not_ready"), True),
        ("restart", ended("finished"), False),
        ("restart", ended("finished", timeout=2.0), True),
        ("restart", ended("error", "503 not_ready", timeout=16 - 8 + SLACK_S - 1), False),
        ("restart", ended("error", "503 not_ready", timeout=16 - 8 + SLACK_S + 1), True),
        ("restart", ended("error", "in the stream, deadline_exceeded", timeout=11), False),
        ("restart", ended("error", "502 generation_failed", timeout=11), True),
        ("restart", ended("lost", "no end", timeout=11), True),
    ],
)
def test_what_is_bad(kind: Kind, story: Story, bad: bool) -> None:
    found = toll(kind, [DEATH], [story], RESUMED, 0.0)
    assert bool(found.bad) == bad
    assert found.passed != bad
    assert all(words in "\n".join(lines([found])) for words in found.bad)


def test_who_asked_the_very_node_that_died_waits_for_that_node() -> None:
    at_bob = msgspec.structs.replace(STORY, node="bob")
    found = toll("freeze", [DEATH], [STORY, at_bob], RESUMED, 0.0)
    assert (found.requests, found.resumed, found.pauses.count, found.others.count) == (2, 1, 1, 0)
    assert found.detectable.longest == 0.5
    assert found.outcomes == {"finished": 2}


def status(*pipelines: str, leader: str = "a", loads: str = "") -> dict[str, object]:
    """Of pipelines like "abc"; the node that `loads` is not ready."""
    lines = [
        [{"node": node, "state": "loading" if node == loads else "ready"} for node in line]
        for line in pipelines
    ]
    return {"leader": leader, "models": [{"pipelines": lines}]}


@pytest.mark.parametrize(
    ("kind", "found"),
    [
        ("node", "abcd"),
        ("executor", "abcd"),
        ("freeze", "abcd"),
        ("leader", "a"),
        ("head", "b"),
        ("middle", "c"),
        ("tail", "d"),
    ],
)
def test_who_may_be_meant(kind: Kind, found: str) -> None:
    shown = status("a", "bcd")
    assert victims(kind, shown) == set(found)
    assert choose(random.Random(1), kind, shown) in found


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "restart"])
def test_nobody_is_killed_whom_no_other_pipeline_replaces(kind: Kind) -> None:
    assert choose(random.Random(1), kind, status("abc")) is None
    assert choose(random.Random(1), kind, status("abc", "d", loads="d")) is None
    assert victims(kind, status("ab", "cb", leader="b")) <= {"a", "c"}


def test_one_kind_leaves_no_pipeline() -> None:
    assert victims("restart", status("abc")) == {"a", "b", "c"}


def test_every_kind_has_a_cluster() -> None:
    assert sorted(kind for layout in LAYOUTS for kind in layout.kinds) == sorted(KINDS)
