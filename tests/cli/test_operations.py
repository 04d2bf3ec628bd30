"""`pxd drain`, `pxd resume` and `pxd models`, against a served fake daemon."""

import json
import threading
from pathlib import Path

import msgspec
import pytest

from pxd.cli import progress
from pxd.cli.client import Refused
from pxd.serving.status import AddedView, ClusterStatus, ModelView
from tests.api.fakes import PEERS, LiveServer, node, pipeline, serving_status, stage

from .tools import pxd, write_daemon_file


@pytest.fixture(autouse=True)
def instance(server: LiveServer, default_instance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "STUCK_S", 0.0)
    write_daemon_file(default_instance, server.url)


def show(server: LiveServer, *nodes: object, models: list[ModelView] | None = None) -> None:
    status = serving_status()
    server.daemon.cluster = msgspec.structs.replace(
        status,
        nodes=list(nodes) or status.nodes,
        models=status.models if models is None else models,
    )


def model(name: str, state: str, reason: str = "", **more: object) -> ModelView:
    fields: dict[str, object] = {"layers": 8, "pipelines": []}
    return ModelView(name=name, state=state, reason=reason, **(fields | more))  # type: ignore[arg-type]


def test_a_drain_waits_until_nothing_is_held(server: LiveServer) -> None:
    show(server, node("anna", stage(0, 8)), node("ben", drained=True))
    done = pxd("drain", "ben")
    assert done.exit_code == 0, done.stderr
    assert "`pxd resume ben` undoes that" in done.stdout
    assert "safe to stop it" in done.stdout
    assert server.daemon.drains.drained
    assert "takes part again" in pxd("resume", "ben").stdout
    assert "was not drained" in pxd("resume", "ben").stdout


def test_a_drain_of_what_nobody_can_replace_says_so(server: LiveServer) -> None:
    chain = pipeline(("anna", 0, 4), ("ben", 4, 8))
    needed = model("demo", "serving", "1.2 GiB are missing", retiring=[chain])
    show(server, node("ben", stage(4, 8), drained=True), models=[needed])
    done = pxd("drain", "ben")
    assert done.exit_code == 1
    for words in ("1.2 GiB are missing", "pxd resume ben", "Start more nodes"):
        assert words in done.stderr
    assert pxd("drain", "--no-wait", "ben").exit_code == 0


def test_a_drain_refused() -> None:
    done = pxd("drain", "nobody")
    assert (done.exit_code, done.stdout) == (1, "")
    assert "no such node" in done.stderr


def test_for_programs(server: LiveServer) -> None:
    drained = json.loads(pxd("drain", "--no-wait", "--json", "ben").stdout)
    assert drained == {
        "node": {"id": PEERS["ben"], "name": "ben"},
        "drained": True,
        "changed": True,
    }
    used = json.loads(pxd("models", "use", "--no-wait", "--json", "other").stdout)
    assert used["names"] == ["demo", "other"]
    listed = json.loads(pxd("models", "list", "--json").stdout)
    assert [each["name"] for each in listed["models"]] == ["demo"]


def test_use_waits_until_the_model_is_served(server: LiveServer) -> None:
    served = model("other", "serving", pipelines=[pipeline(("anna", 0, 8))])
    show(server, models=[*serving_status().models, served])
    done = pxd("models", "use", "other")
    assert done.exit_code == 0, done.stderr
    assert "is to serve demo, other" in done.stdout
    assert "other is served" in done.stdout


def test_use_says_why_a_model_is_not_served(server: LiveServer) -> None:
    crowded = model("other", "waiting", "there is no room for it beside demo")
    show(server, models=[*serving_status().models, crowded])
    done = pxd("models", "use", "other")
    assert done.exit_code == 1
    assert "no room for it beside demo" in done.stderr
    assert "no such model" in pxd("models", "use", "nonsense").stderr
    assert pxd("models", "use", "./nowhere").exit_code == 2


def test_stop_waits_until_it_is_gone(server: LiveServer) -> None:
    show(server, models=[])
    done = pxd("models", "stop", "demo")
    assert done.exit_code == 0, done.stderr
    assert "is to serve no model" in done.stdout
    assert "`pxd models use demo` serves it again" in done.stdout


def test_the_list_says_who_holds_what_and_what_retires(server: LiveServer) -> None:
    going = model("other", "stopping", retiring=[pipeline(("carl", 0, 8))])
    show(server, models=[*serving_status().models, going])
    lines = pxd("models", "list").stdout
    assert "anna [0,3)" in lines
    assert "retiring: carl [0,8)" in lines
    assert "stopping" in lines


def test_the_status_shows_who_is_drained(server: LiveServer) -> None:
    show(server, node("anna", stage(0, 8)), node("ben", drained=True))
    assert "drained" in pxd("status").stdout
    assert json.loads(pxd("status", "--json").stdout)["nodes"][1]["drained"] is True


def added(server: LiveServer, **fields: object) -> None:
    view = AddedView(name="acme/other", **fields)  # type: ignore[arg-type]
    server.daemon.cluster = msgspec.structs.replace(serving_status(), added=[view])


def test_add_waits_until_it_is_here(server: LiveServer) -> None:
    added(server, state="here", progress=1.0)
    done = pxd("models", "add", "acme/other")
    assert done.exit_code == 0, done.stderr
    assert server.daemon.added.names == ["acme/other"]
    assert "acme/other is on this node; `pxd models use acme/other` serves it" in done.stdout
    assert "on its way" in pxd("models", "add", "--no-wait", "acme/other").stdout


def test_add_says_why_it_does_not_come(server: LiveServer) -> None:
    added(server, state="failed", reason="no space left for acme/other")
    done = pxd("models", "add", "acme/other")
    assert done.exit_code == 1
    assert "cannot be fetched: no space left for acme/other" in done.stderr
    assert "no such model" in pxd("models", "add", "nonsense").stderr
    assert pxd("models", "add", "./nowhere").exit_code == 2


def test_a_quantised_copy_is_made_before_it_is_served(server: LiveServer) -> None:
    served = model("acme/other-4bit", "serving", pipelines=[pipeline(("anna", 0, 8))])
    show(server, models=[served])
    here = [AddedView(name="acme/other-4bit", state="here")]
    server.daemon.cluster = msgspec.structs.replace(server.daemon.cluster, added=here)
    done = pxd("models", "use", "acme/other", "--quantize", "4")
    assert done.exit_code == 0, done.stderr
    assert server.daemon.added.names == ["acme/other-4bit"]
    assert server.daemon.choices.choice.names == ("demo", "acme/other-4bit")
    done = pxd("models", "add", "acme/other", "--quantize", "4")
    assert "acme/other-4bit is on this node" in done.stdout
    refused = pxd("models", "add", "acme/other", "--quantize", "7")
    assert (refused.exit_code, "MLX has 2, 3, 4, 5, 6, 8 bits" in refused.stderr) == (2, True)
    assert pxd("models", "use", "acme/other", "--quantize", "4", "--no-wait").exit_code == 2


def test_what_takes_long_is_waited_for_and_explained(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    polls, answered = 0, threading.Event()

    def fetch(*_: object) -> tuple[bytes, ClusterStatus]:
        nonlocal polls
        polls += 1
        if polls == 3:
            answered.set()
        return b"", msgspec.structs.replace(serving_status(), looking="other: taking its time")

    monkeypatch.setattr("pxd.cli.status.fetch", fetch)
    monkeypatch.setattr(progress, "QUIET_S", 0.0)
    monkeypatch.setattr(progress, "EVERY_S", 0.0)

    def call() -> bool:
        return answered.wait(60)

    assert progress.meanwhile(None, None, call, lambda status: status.looking, quiet=False)
    assert capsys.readouterr().err == "  other: taking its time\n"

    def refuse() -> None:
        raise Refused("no such model", None, None)

    with pytest.raises(Refused, match="no such model"):
        progress.meanwhile(None, None, refuse, lambda status: status.looking, quiet=True)


def test_remove_says_what_is_left(server: LiveServer) -> None:
    done = pxd("models", "remove", "acme/other")
    assert "What pxd had kept of it is deleted. /hub/cache is left alone." in done.stdout
    assert "serves layers" in pxd("models", "remove", "needed").stderr
    assert json.loads(pxd("models", "remove", "--json", "other").stdout)["deleted"] is True


def test_the_list_says_who_has_files(server: LiveServer) -> None:
    show(server, node("anna", files=["demo", "acme/other"]), node("ben", files=["demo"]))
    lines = pxd("models", "list").stdout.splitlines()
    assert [line.split() for line in lines[-3:]] == [
        ["FILES", "OF", "ON"],
        ["acme/other", "anna"],
        ["demo", "anna,", "ben"],
    ]
    shown = json.loads(pxd("models", "list", "--json").stdout)
    assert shown["files"] == {"anna": ["demo", "acme/other"], "ben": ["demo"]}


def test_the_list_says_what_is_on_its_way_here(server: LiveServer) -> None:
    added(server, state="failed", progress=0.4, reason="no space left")
    assert "acme/other  failed  40%   no space left" in pxd("models", "list").stdout
    added(server, state="here", progress=1.0)
    assert "ADDED HERE" not in pxd("models", "list").stdout


def test_the_status_says_where_layers_come_from(server: LiveServer) -> None:
    coming = stage(0, 8, state="loading", progress=0.25, reason="fetching from ben")
    show(server, node("anna", coming), node("ben"))
    shown = pxd("status").stdout
    assert "loading 25% (fetching from ben)" in shown
    assert "PROBLEM" not in shown
