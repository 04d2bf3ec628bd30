"""Plans change under load, and what was decided outlives all processes."""

import json
import signal
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from tests.tiny_models import make_tiny_model

from .daemons import Daemon, Status, all_hold, cluster, pipelines, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

NAMES = ("anna", "ben", "carl")
QUESTIONS = ("Count from 1 to 20.", "Say the alphabet.", "What is 17 + 25?")
MAX_TOKENS = 60
MOVED = "goes on after a failure"


def control(daemon: Daemon, *arguments: str) -> Any:
    done = daemon.pxd(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


class Load:
    """Clients that stream greedy answers without a pause, one at each of some nodes.

    They name no model. An answer is right if one of `right` by question.
    """

    def __init__(self, daemons: Sequence[Daemon], right: dict[str, set[str]]) -> None:
        self.right = right
        self.wrong: list[str] = []
        self.answers = 0
        self._over = threading.Event()
        self._threads = [
            threading.Thread(target=self._ask_on, args=(daemon.url, number))
            for number, daemon in enumerate(daemons)
        ]

    def _ask_on(self, url: str, number: int) -> None:
        while not self._over.is_set():
            question = QUESTIONS[number % len(QUESTIONS)]
            number += 1
            try:
                answer = stream(url, question)
            except (httpx.HTTPError, AssertionError, ValueError) as error:
                self.wrong.append(f"{question} {error!r}")
            else:
                if answer not in self.right[question]:
                    self.wrong.append(f"{question} {answer}")
                self.answers += 1

    def stop_after_this(self) -> None:
        """Ask nothing more once the answers that are under way are there."""
        self._over.set()

    def __enter__(self) -> "Load":
        for thread in self._threads:
            thread.start()
        return self

    def wait_more(self, count: int) -> None:
        """Until that many more answers have come."""
        goal = self.answers + count
        wait_for(lambda: self.answers >= goal or self.wrong, f"{count} more answers")

    def __exit__(self, *exc_info: object) -> None:
        self._over.set()
        for thread in self._threads:
            thread.join(120)
        assert self.wrong == []


def stream(url: str, question: str, **options: Any) -> str:
    body = {
        "messages": [{"role": "user", "content": question}],
        "temperature": 0,
        "max_tokens": MAX_TOKENS,
        "stream": True,
        **options,
    }
    text, done = "", False
    chat = f"{url}/v1/chat/completions"
    with httpx.stream("POST", chat, json=body, timeout=120, verify=False) as response:
        assert response.status_code == 200, response.read()
        for line in response.iter_lines():
            if line == "data: [DONE]":
                done = True
            elif line.startswith("data: "):
                chunk = json.loads(line.removeprefix("data: "))
                assert "error" not in chunk, chunk
                text += chunk["choices"][0]["delta"].get("content") or ""
    assert done, "the stream ended without [DONE]"
    return text


def answers_of(daemon: Daemon, **options: Any) -> dict[str, str]:
    return {question: stream(daemon.url, question, **options) for question in QUESTIONS}


def served(*models: str) -> Any:
    def check(status: Status) -> bool:
        return [m["name"] for m in status["models"] if m["state"] == "serving"] == list(models)

    return check


def stages_of(status: Status, peer: str) -> list[Any]:
    return next(node["stages"] for node in status["nodes"] if node["id"] == peer)


def lose_power(daemons: Sequence[Daemon]) -> None:
    """All of them at once; they are started again with the options that they had."""
    for daemon in daemons:
        daemon.keep_port()
    for daemon in daemons:
        daemon.signal(signal.SIGKILL)
    for daemon in daemons:
        daemon.process.wait()
    for daemon in daemons:
        daemon.start()


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    """Two of the three form a pipeline; the third is a spare."""
    root = tmp_path_factory.mktemp("three")
    with cluster(root, NAMES, "--max-layers", "4", ready=all_hold(3)) as daemons:
        yield daemons


@pytest.fixture(scope="module")
def right(three: list[Daemon]) -> dict[str, set[str]]:
    return {question: {answer} for question, answer in answers_of(three[0]).items()}


def at_stage(daemons: Sequence[Daemon], number: int) -> tuple[Daemon, str, list[Daemon]]:
    """Who holds that stage of the pipeline, its id, and the others."""
    [line] = pipelines(daemons[0].status())
    peer = line[number]["node"]
    found = next(daemon for daemon in daemons if daemon.id == peer)
    return found, peer, [daemon for daemon in daemons if daemon is not found]


@pytest.mark.parametrize("stage", [0, 1])
def test_drains_under_load_cost_no_answer(
    three: list[Daemon], right: dict[str, set[str]], stage: int
) -> None:
    drained, peer, [asked, _] = at_stage(three, stage)
    with Load(three, right) as load:
        assert control(asked, "drain", drained.name)["changed"]
        assert stages_of(asked.status(), peer) == []
        load.wait_more(6)
        assert control(asked, "resume", drained.name)["changed"]
        asked.wait_status(all_hold(3), "it takes part again")
        load.wait_more(3)


def test_who_leaves_under_load_costs_no_answer(
    three: list[Daemon], right: dict[str, set[str]]
) -> None:
    """The head goes; its own client has its answer, and so do those of the others."""
    for daemon in three:
        daemon.wait_status(all_hold(3), "all take part")
    leaver, _, stayers = at_stage(three, 0)
    children = leaver.executors()
    with Load(stayers, right) as load, Load([leaver], right) as own:
        load.wait_more(2)
        own.stop_after_this()
        leaver.signal(signal.SIGTERM)
        leaver.process.wait(60)
        load.wait_more(2)
    assert leaver.process.returncode == 0
    assert psutil.wait_procs(children, timeout=10)[1] == []
    assert "leaving; waits for" in leaver.log
    assert not (leaver.data_dir / "daemon.json").exists()
    for daemon in stayers:
        [state] = [n["state"] for n in daemon.status()["nodes"] if n["name"] == leaver.name]
        assert state == "left"
    leaver.start()
    for daemon in three:
        daemon.wait_status(all_hold(3), "it is back, counted once, and not drained")
        assert sorted(node["name"] for node in daemon.status()["nodes"]) == sorted(NAMES)
    for daemon in three:
        daemon.signal(signal.SIGTERM)
    for daemon in three:
        assert daemon.process.wait(60) == 0


def test_models_come_and_go_under_load(tmp_path: Path) -> None:
    tiny = str(make_tiny_model("llama", tmp_path / "tiny"))
    with cluster(tmp_path, NAMES[:2], ready=all_hold(2)) as daemons:
        anna, ben = daemons
        demo = answers_of(anna)
        used = control(anna, "models", "use", tiny)
        assert (used["names"], used["changed"]) == (["demo", tiny], True)
        for daemon in daemons:
            daemon.wait_status(served("demo", tiny), "both are served")
            assert answers_of(daemon, model="demo") == demo
        other = answers_of(anna, model="tiny")
        assert answers_of(ben, model=tiny) == other != demo

        stopped = control(ben, "models", "stop", "tiny")
        assert stopped["names"] == ["demo"]
        for daemon in daemons:
            daemon.wait_status(served("demo"), "one is served")
        refused = anna.chat("What is 17 + 25?", model=tiny)
        assert (refused.status_code, "demo" in refused.text) == (404, True)

        either = {question: {demo[question], other[question]} for question in QUESTIONS}
        with Load(daemons, either) as load:
            load.wait_more(4)
            assert control(ben, "models", "use", "--only", tiny)["outgoing"] == ["demo"]
            for daemon in daemons:
                daemon.wait_status(
                    lambda status: [m["name"] for m in status["models"]] == [tiny],
                    "the other one alone is served",
                )
            load.wait_more(4)
        assert answers_of(ben) == other

        # A node that joins is a pipeline more; requests on the others never notice.
        moved = [daemon.log.count(MOVED) for daemon in daemons]
        carl = Daemon(tmp_path, "carl", join=anna.ticket())
        try:
            with Load(daemons, {question: {other[question]} for question in QUESTIONS}) as load:
                for daemon in (*daemons, carl):
                    daemon.wait_status(all_hold(3), "it serves, too")
                load.wait_more(4)
            assert [daemon.log.count(MOVED) for daemon in daemons] == moved
        finally:
            carl.end()

        # What was decided is decided still, whatever all of them go through.
        peers = [daemon.id for daemon in daemons]
        control(ben, "drain", "anna")
        lose_power(daemons)
        for daemon in daemons:
            status = daemon.wait_status(served(tiny), "it is served again")
            daemon.wait_status(
                lambda status: [n["name"] for n in status["nodes"] if n["drained"]] == ["anna"],
                "anna is drained still",
            )
        assert [daemon.id for daemon in daemons] == peers
        assert peers[0] not in [stage["node"] for line in pipelines(status) for stage in line]
        assert answers_of(anna) == other
        wrong = anna.pxd("models", "use", "no/such-model-anywhere")
        assert wrong.returncode == 1
        assert "cannot be served" in wrong.stderr
        assert served(tiny)(anna.status())
