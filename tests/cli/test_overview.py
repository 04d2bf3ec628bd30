"""What `pxd status` says, in a pipe and on a screen."""

import io
import unicodedata
from collections.abc import Callable

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len
from rich.console import Console

from pxd.cli.overview import Overview, overview
from pxd.cli.plain import columns, render
from pxd.cli.screen import Screen, bar
from pxd.cli.words import clean, clean_answer, device, duration, memory
from pxd.serving.status import (
    ClusterStatus,
    Figures,
    KvView,
    ModelView,
    NodeView,
    PipelineFigures,
    SpareView,
)
from tests.api.fakes import PEERS, node, pipeline, serving_status, stage


def draw(view: Overview, width: int) -> str:
    output = io.StringIO()
    Console(file=output, width=width, force_terminal=True, color_system=None).print(Screen(view))
    return output.getvalue()


def troubled_status() -> ClusterStatus:
    nodes = [
        node("anna", stage(0, 3)),
        node("ben", stage(3, 6, "loading", progress=0.45), running=3, waiting=12),
        node("carl", stage(6, 8, "restarting", restarts=2, reason="killed by signal 9")),
        node("dora", state="suspect", since=7.0, connected=False, problem="disk full"),
        NodeView(
            id="12D3KooWxxxxx",
            name="anna",
            state="dead",
            device="cuda: \x1b[31m[bold]GPU",
            memory_gib=0.75,
            stages=[],
            since=5000.0,
        ),
    ]
    chain = [
        *pipeline(("anna", 0, 3)),
        *pipeline(("ben", 3, 6), state="loading"),
        *pipeline(("carl", 6, 8), state="restarting"),
    ]
    model = ModelView(
        name="demo", state="loading", reason="ben is loading", layers=8, pipelines=[chain]
    )
    return msgspec.structs.replace(serving_status(), nodes=nodes, models=[model])


def measured_status() -> ClusterStatus:
    """One pipeline with figures, and a node that stands by for its second stage."""
    predicted = Figures(
        prompt_tokens=1024,
        ttft_ms=400.0,
        token_ms=12.34,
        tokens_per_s=81.2,
        bottleneck=PEERS["ben"],
    )
    measured = Figures(prompt_tokens=900, ttft_ms=None, token_ms=13.0, tokens_per_s=None)
    model = ModelView(
        name="demo",
        state="serving",
        reason="",
        layers=8,
        pipelines=[[*pipeline(("anna", 0, 3)), *pipeline(("ben", 3, 8))]],
        figures=[PipelineFigures(predicted=predicted, measured=measured)],
        kv=[KvView(total=1200, free=1150, cached=300, block_tokens=64)],
        spares=[SpareView(node=PEERS["carl"], start=3, end=8)],
    )
    held = msgspec.structs.replace(stage(3, 8), pipeline="spare-1")
    nodes = [node("anna", stage(0, 3)), node("ben", stage(3, 8)), node("carl", held)]
    return msgspec.structs.replace(serving_status(), nodes=nodes, models=[model])


@pytest.mark.parametrize("show", [render, lambda view: draw(view, 160)])
def test_predicted_and_measured_figures_side_by_side(show: Callable[[Overview], str]) -> None:
    shown = show(overview(measured_status()))
    assert (
        "predicted 12.3 ms/token, 0.4 s to the first after 1,024, 81.2 tokens/s · "
        "measured 13 ms/token · slowest stage ben · 50 of 1,200 KV blocks held"
    ) in shown
    assert "spare: carl [3,8)" in shown
    assert "[3,8) spare, ready" in shown


def test_a_cluster_at_work_in_a_pipe() -> None:
    assert render(overview(serving_status())).splitlines() == [
        "anna at http://127.0.0.1:8470, up 3 min",
        "leader ben, term 4, epoch 4.2@enBenB, 3 of 3 nodes alive",
        "",
        "NODE  STATE  DEVICE              MEMORY    STAGES            ROLE",
        "anna  alive  cpu: AMD EPYC 9554  15.5 GiB  demo [0,3) ready  this node",
        "ben   alive  cpu: AMD EPYC 9554  15.5 GiB  demo [3,6) ready  leader",
        "carl  alive  cpu: AMD EPYC 9554  15.5 GiB  demo [6,8) ready  -",
        "",
        "MODEL  STATE    LAYERS  PIPELINE",
        "demo   serving  8       anna [0,3) → ben [3,6) → carl [6,8)",
    ]


def test_trouble_in_a_pipe() -> None:
    text = render(overview(troubled_status()), arrow="->")
    assert "[3,6) loading 45% -> carl [6,8) restarting\n" in text
    assert "ben is loading" in text
    assert "dead 83 min" in text
    assert "carl  demo [6,8), restarted 2 times, restarting: killed by signal 9" in text
    assert "has not answered for 7 s" in text
    assert "disk full" in text
    assert "\x1b" not in text
    assert "anna~xxxxx" in text, "two nodes of one name must be told apart"


def test_what_an_executor_went_through() -> None:
    troubled = stage(0, 3, slow=4.2, out_of_memory=3, not_finite=1, restarts=2, hangs=1)
    status = msgspec.structs.replace(serving_status(), nodes=[node("anna", troubled)])
    text = render(overview(status), arrow="->")
    assert "anna  demo [0,3) takes 4.2 times longer than usual" in text
    assert "anna  demo [0,3) 3 times had no memory for a step" in text
    assert "anna  demo [0,3) once computed NaN or infinity" in text
    assert "restarted 2 times (once because it gave no answer), ready again" in text


def test_a_node_behind_a_relay() -> None:
    nodes = [node("anna", relay=True), node("ben", path="relayed", through=PEERS["anna"])]
    view = overview(msgspec.structs.replace(serving_status(), nodes=nodes))
    assert "ben   is reached through anna only, which is slower" in render(view)


def test_a_node_that_leaves() -> None:
    status = serving_status()
    nodes = [msgspec.structs.replace(each, leaving=each.name == "anna") for each in status.nodes]
    view = overview(msgspec.structs.replace(status, nodes=nodes, waits_for="others to load demo"))
    assert [each.roles for each in view.nodes] == ["this node, leaving", "leader", ""]
    assert view.problems == [("anna", "is about to leave and waits for others to load demo")]


def test_a_cluster_without_a_plan() -> None:
    status = msgspec.structs.replace(serving_status(), models=[], leader=None, epoch=None)
    view = overview(status)
    assert "leader none yet" in render(view)
    assert "no plan yet" in render(view)
    assert "no plan yet" in draw(view, 80)


def test_a_node_that_is_alone_says_why() -> None:
    hint = "cannot connect to 10.0.0.2:8471\x1b[31m: no answer"
    status = msgspec.structs.replace(serving_status(), hints=[hint])
    assert overview(status).problems[0][0] == "anna"
    assert "\x1b" not in overview(status).problems[0][1]
    assert overview(status).problems[0][1].startswith("cannot connect to 10.0.0.2:8471")
    assert overview(status).problems[0][1] in render(overview(status))


@pytest.mark.parametrize("width", [60, 80, 120])
def test_a_screen_says_every_state_in_words(width: int) -> None:
    text = draw(overview(troubled_status()), width)
    for words in ("ready", "loading 45%", "restarting", "suspect 7 s", "dead 83 min", "leader"):
        assert words in text
    assert "anna~aAnna [0,3) → ben [3,6) loading 45% → carl [6,8)" in " ".join(text.split())
    assert "\x1b[31m" not in text


def test_a_wide_screen_says_more() -> None:
    view = overview(troubled_status())
    assert "requests" not in draw(view, 80)
    assert "3 running, 12 waiting" in draw(view, 160)
    assert "TFLOP/s" in draw(view, 200)


@given(st.integers(40, 220), st.sampled_from([serving_status(), troubled_status()]))
def test_a_screen_never_overflows(width: int, status: ClusterStatus) -> None:
    assert all(cell_len(line) <= width for line in draw(overview(status), width).splitlines())


@given(
    total=st.integers(1, 200),
    width=st.integers(1, 40),
    progress=st.floats(0, 1),
    data=st.data(),
)
def test_bars_fill_their_width(
    total: int, width: int, progress: float, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, total - 1))
    end = data.draw(st.integers(start + 1, total))
    model = ModelView(name="demo", state="loading", reason="", layers=total, pipelines=[])
    status = msgspec.structs.replace(
        serving_status(),
        nodes=[node("anna", stage(start, end, "loading", progress=progress))],
        models=[model],
    )
    text = bar(overview(status).nodes[0].stages[0], width).plain
    assert len(text) == width
    assert "━" in text or "╌" in text


def test_stages_that_share_a_model_do_not_overlap_in_their_bars() -> None:
    drawn = [bar(each.stages[0], 16).plain for each in overview(serving_status()).nodes]
    assert all(sum(line[i] == "━" for line in drawn) == 1 for i in range(16))


def test_an_unknown_node_in_a_plan_is_shown_by_its_id() -> None:
    status = serving_status()
    status = msgspec.structs.replace(status, nodes=[n for n in status.nodes if n.name != "carl"])
    assert f"~{PEERS['carl'][-5:]} [6,8)" in render(overview(status))


@given(st.text())
def test_names_cannot_steer_a_terminal(text: str) -> None:
    assert all(c == " " or unicodedata.category(c)[0] not in "CZ" for c in clean(text))
    assert len(clean(text)) == len(text)


@given(st.text())
def test_answers_cannot_steer_a_terminal(text: str) -> None:
    assert all(c in "\n\t" or unicodedata.category(c) != "Cc" for c in clean_answer(text))


def test_answers_keep_what_people_read() -> None:
    assert clean_answer("a\n\tb 👩‍💻 日本 é") == "a\n\tb 👩‍💻 日本 é"
    assert clean_answer("\x1b[2J\r\x9b") == "\ufffd[2J\ufffd\ufffd"


def test_words() -> None:
    assert [duration(s) for s in (0.4, 12, 89, 100, 7200, 200_000)] == [
        *("0 s", "12 s", "89 s"),
        *("2 min", "2 h", "2 days"),
    ]
    assert [memory(gib) for gib in (0.5, 15.53, 480)] == ["512 MiB", "15.5 GiB", "480 GiB"]
    assert device("cpu: Intel(R) Xeon(R) CPU E5-2680 @ 2.50GHz") == "cpu: Intel Xeon E5-2680"


def test_columns() -> None:
    assert columns(("A", "B"), [("aaa", "b"), ("", "bb")]) == ["A    B", "aaa  b", "     bb"]
