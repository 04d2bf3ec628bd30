"""The acceptance of the walking skeleton: real processes, sockets, signals and a real model."""

import contextlib
import itertools
import json
import os
import re
import signal
import socket
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
import pytest
import trio

from pxd.identity import Ticket
from scripts.disorder.rude import Leavers, Sippers

from .daemons import Daemon, all_hold, cluster, own_stages, pipelines, serving_on, wait_for

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

NAMES = ("anna", "ben", "carl")
# The model has 8 layers and would fit on one node, which leaves nothing to split.
OVER_THREE = ("--max-layers", "3")
OVER_TWO = ("--max-layers", "4")
FACTS = {
    "What is 17 + 25?": "42",
    "What is the capital of Norway?": "Oslo",
    "Sort 5 2 9 1.": "1 2 5 9",
    "What day comes after Monday?": "Tuesday",
    "Which month comes after June?": "July",
    "What is 7 * 8?": "56",
    "Spell table.": "T A B L E",
    "What is 12 + 7?": "19",
}


def stream_text(daemon: Daemon, question: str) -> Iterator[str]:
    """The pieces of a greedy answer, as the openai client gets them."""
    client = openai.OpenAI(base_url=f"{daemon.url}/v1", api_key="none")
    stream = client.chat.completions.create(
        model="demo",
        messages=[{"role": "user", "content": question}],
        temperature=0,
        stream=True,
    )
    for chunk in stream:
        yield chunk.choices[0].delta.content or ""


@pytest.fixture(scope="module")
def three(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    with cluster(tmp_path_factory.mktemp("three"), NAMES, *OVER_THREE) as daemons:
        yield daemons


def test_every_node_shows_the_same_cluster(three: list[Daemon]) -> None:
    statuses = [daemon.status() for daemon in three]
    assert len({status["self"] for status in statuses}) == 3
    for status in statuses:
        assert status["leader"] == statuses[0]["leader"] is not None
        assert status["epoch"] == statuses[0]["epoch"]
        assert {node["name"] for node in status["nodes"]} == set(NAMES)
        assert {node["state"] for node in status["nodes"]} == {"alive"}
        ranges = own_stages(status)
        assert ranges[0][0] == 0
        assert ranges[-1][1] == status["models"][0]["layers"]
        assert all(a[1] == b[0] for a, b in itertools.pairwise(ranges))


def check_plan(daemon: Daemon) -> None:
    """Every pipeline has its prediction, and no node comes to another plan than the leader."""
    shown = daemon.pxd("status", "--json")
    assert shown.returncode == 0, shown.stderr
    status = json.loads(shown.stdout)
    assert [node["problem"] for node in status["nodes"]] == [""] * len(status["nodes"])
    [model] = status["models"]
    assert len(model["figures"]) == len(model["pipelines"])
    for figures in model["figures"]:
        for figure in ("ttft_ms", "token_ms", "tokens_per_s"):
            assert figures["predicted"][figure] > 0


def test_the_same_answer_at_every_node(three: list[Daemon]) -> None:
    for question, fact in list(FACTS.items())[:3]:
        assert [daemon.answer(question) for daemon in three] == [fact] * 3
    for daemon in three:
        check_plan(daemon)


@pytest.mark.skipif(not psutil.LINUX, reason="what a process has mapped shows on Linux only")
def test_no_process_carries_pytorch_along(three: list[Daemon]) -> None:
    for daemon in three:
        for process in (psutil.Process(daemon.process.pid), *daemon.executors()):
            mapped = {Path(mapped.path).name for mapped in process.memory_maps()}
            assert any(name.startswith("libc.") for name in mapped)
            assert not any("torch" in name for name in mapped)


def test_eight_concurrent_streams_at_different_nodes(three: list[Daemon]) -> None:
    def stream(item: tuple[int, str]) -> str:
        number, question = item
        return "".join(stream_text(three[number % 3], question))

    with ThreadPoolExecutor(8) as pool:
        assert list(pool.map(stream, enumerate(FACTS))) == list(FACTS.values())


def test_seeded_sampling_is_the_same_everywhere(three: list[Daemon]) -> None:
    options = {"temperature": 1.5, "seed": 7, "max_tokens": 30}
    answers = {daemon.answer("Say the alphabet.", **options) for daemon in three}
    assert len(answers) == 1
    others = {three[0].answer("Say the alphabet.", **{**options, "seed": s}) for s in range(5)}
    assert len(others) > 1


def test_a_second_daemon_on_the_same_data_directory_is_refused(three: list[Daemon]) -> None:
    second = three[0].pxd("start", "--no-mdns")
    assert second.returncode == 1
    assert "already runs" in second.stderr
    assert "Traceback" not in second.stderr


def all_given_back(status: dict[str, Any]) -> bool:
    """No request is left, and no KV block of one, neither at a head nor at a stage."""
    blocks = [kv for model in status["models"] for kv in model["kv"]]
    held = [stage["kv_held"] for node in status["nodes"] for stage in node["stages"]]
    requests = [node["running"] + node["waiting"] for node in status["nodes"]]
    return all(kv["free"] == kv["total"] > 0 for kv in blocks) and not any(held + requests)


def test_clients_that_leave_or_hardly_read_leave_nothing_behind(three: list[Daemon]) -> None:
    places = [daemon.url.removeprefix("http://") for daemon in three]
    leavers, sippers = Leavers(places, 300, seed=1), Sippers(places, 300)

    async def abuse() -> None:
        held = False
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(leavers.run, number)
                nursery.start_soon(sippers.run, number)
            while leavers.left.total() < 20 or not held:
                held |= not all_given_back(await trio.to_thread.run_sync(three[0].status))
            leavers.over.set()
            sippers.over.set()

    trio.run(abuse)
    with ThreadPoolExecutor(60) as pool:
        answers = pool.map(lambda n: three[n % 3].answer("What is 17 + 25?"), range(60))
        assert set(answers) == {"42"}
    for daemon in three:
        daemon.wait_status(all_given_back, "all is given back")


def test_bytes_from_strangers_leave_the_cluster_answering(three: list[Daemon]) -> None:
    address = Ticket.parse(three[0].ticket()).addresses[0]
    port = int(re.search(r"/tcp/(\d+)", address)[1])  # type: ignore[index]
    with socket.create_connection(("127.0.0.1", port)) as garbage:
        with contextlib.suppress(OSError):  # Refused before the end: just as good.
            garbage.sendall(os.urandom(1 << 20))
        half_open = socket.create_connection(("127.0.0.1", port))
        crowd = [socket.create_connection(("127.0.0.1", port)) for _ in range(200)]
        assert three[1].answer("What is 17 + 25?") == "42"
        for connection in [half_open, *crowd]:
            connection.close()
    assert three[2].answer("What is 17 + 25?") == "42"
    for daemon in three:
        assert {node["state"] for node in daemon.status()["nodes"]} == {"alive"}


def test_a_wrong_key_never_gets_in(three: list[Daemon], tmp_path: Path) -> None:
    real = Ticket.parse(three[0].ticket())
    forged = str(Ticket(bytes(32), real.addresses))
    stranger = Daemon(tmp_path, "stranger", join=forged)
    try:
        wait_for(lambda: "key" in stranger.log.lower(), "the stranger says why it is refused")
        wait_for(lambda: "refused" in three[0].log, "the member says whom it refused")
        assert len(stranger.status()["nodes"]) == 1
        stranger_id = stranger.id
        for daemon in three:
            assert stranger_id not in [node["id"] for node in daemon.status()["nodes"]]
    finally:
        stranger.end()


def test_a_killed_executor_is_restarted(three: list[Daemon]) -> None:
    for daemon in three:
        [executor] = daemon.executors()
        executor.kill()
        assert daemon.answer("What is 17 + 25?") == "42"
        daemon.wait_status(
            lambda status, daemon=daemon: any(
                stage["restarts"] > 0 and stage["state"] == "ready"
                for node in status["nodes"]
                if node["name"] == daemon.name
                for stage in node["stages"]
            ),
            "the restart is reported",
        )
        assert daemon.executors()[0].pid != executor.pid


def test_a_killed_executor_in_the_middle_of_an_answer(three: list[Daemon]) -> None:
    def ask() -> str:
        return three[1].answer("Say the alphabet.")

    undisturbed = ask()
    pieces = stream_text(three[1], "Say the alphabet.")
    text = ""
    for piece in pieces:
        text += piece
        if len(text) >= 4 and (alive := three[2].executors()):
            alive[0].kill()
            break
    text += "".join(pieces)
    assert text == undisturbed


def test_hidden_states_travel_as_each_node_was_told(tmp_path: Path) -> None:
    with cluster(tmp_path, NAMES[:2], *OVER_TWO, "--wire-dtype", "fp8") as daemons:
        for daemon in daemons:
            assert daemon.answer("What is 17 + 25?") == "42"
        nodes = json.loads(daemons[0].pxd("status", "--json").stdout)["nodes"]
        sent = {stage["start"]: stage["wire_dtype"] for node in nodes for stage in node["stages"]}
        assert sent == {0: "fp8", 4: "native"}, "the last stage sends none"


def check_kill_in_the_middle(asked: Daemon, victim: Daemon) -> None:
    """A stream at `asked` goes on, and right, when `victim` dies; so do the victim's executors."""
    children = victim.executors()
    assert children
    undisturbed = asked.answer("Count from 1 to 20.")
    text = ""
    for piece in stream_text(asked, "Count from 1 to 20."):
        text += piece
        if victim.process.poll() is None and len(text) >= 4:
            victim.signal(signal.SIGKILL)
            victim.process.wait()
    assert text == undisturbed
    assert psutil.wait_procs(children, timeout=20)[1] == []


def holder(daemons: list[Daemon], stage: dict[str, Any]) -> Daemon:
    return next(daemon for daemon in daemons if daemon.id == stage["node"])


def test_a_killed_node_costs_a_pause_and_its_executor_ends(
    three: list[Daemon], tmp_path: Path
) -> None:
    dora = Daemon(tmp_path, "dora", *OVER_THREE, join=three[0].ticket())
    daemons = [*three, dora]
    try:
        for daemon in daemons:
            daemon.wait_status(all_hold(4), "a fourth node holds something, too")
        [line] = pipelines(daemons[0].status())
        assert len(line) >= 3
        victim = holder(daemons, line[1])
        others = [daemon for daemon in daemons if daemon is not victim]
        check_kill_in_the_middle(others[0], victim)
        for daemon in others:
            daemon.wait_status(all_hold(3), "the three others serve")
            assert daemon.answer("What is 17 + 25?") == "42"
    finally:
        dora.end()


def test_a_spare_stands_in_without_loading_anything(tmp_path: Path) -> None:
    """Two slow nodes hold the same layer, which only one of them is needed for."""
    slow = ("--max-layers", "1")
    with cluster(tmp_path, NAMES[:1], "--max-layers", "7", serving=False) as daemons:
        anna, ticket = daemons[0], daemons[0].ticket()
        daemons += [Daemon(tmp_path, n, *slow, join=ticket, slower=1000) for n in NAMES[1:]]
        for daemon in daemons:
            status = daemon.wait_status(all_hold(3), "two serve and one is a spare")
        [line], [spare] = pipelines(status), status["models"][0]["spares"]
        victim = next(holder(daemons, stage) for stage in line if stage["node"] != anna.id)
        survivors = [anna, holder(daemons, spare)]
        assert victim not in survivors
        kept = [daemon.executors() for daemon in survivors]

        check_kill_in_the_middle(anna, victim)
        for daemon in survivors:
            daemon.wait_status(all_hold(2), "the spare stands in")
            assert daemon.answer("What is 17 + 25?") == "42"
        after = pipelines(anna.status())[0]
        lost = (spare["start"], spare["end"])
        assert spare["node"] in [s["node"] for s in after if (s["start"], s["end"]) == lost]
        assert [daemon.executors() for daemon in survivors] == kept


def test_nodes_that_can_hold_the_model_are_replicas(tmp_path: Path) -> None:
    with cluster(tmp_path, NAMES, ready=all_hold(3)) as daemons:
        lines = pipelines(daemons[0].status())
        assert [[(stage["start"], stage["end"]) for stage in line] for line in lines] == [
            [(0, 8)]
        ] * 3
        assert len({line[0]["node"] for line in lines}) == 3
        for daemon in daemons:
            assert daemon.answer("What is 17 + 25?") == "42"
        daemons[0].wait_status(
            lambda status: all(node["running"] == 0 for node in status["nodes"]), "all are idle"
        )
        check_plan(daemons[0])
        # Of idle pipelines the first is taken.
        victim = holder(daemons, lines[0][0])
        others = [daemon for daemon in daemons if daemon is not victim]
        kept = [daemon.executors() for daemon in others]
        check_kill_in_the_middle(others[0], victim)
        for daemon in others:
            daemon.wait_status(all_hold(2), "the two others serve")
            assert daemon.answer("What is 17 + 25?") == "42"
        assert [daemon.executors() for daemon in others] == kept


def test_too_little_capacity_says_what_is_missing(tmp_path: Path) -> None:
    with cluster(tmp_path, NAMES, "--memory", "0.0005", serving=False) as daemons:
        for daemon in daemons:
            status = daemon.wait_status(
                lambda status: (
                    len(status["nodes"]) == 3
                    and status["models"]
                    and "3 nodes" in status["models"][0]["reason"]
                ),
                "the shortage is known",
            )
            [model] = status["models"]
            assert model["state"] == "waiting"
            assert "GiB" in model["reason"]
            assert "missing" in model["reason"]
            response = daemon.chat("What is 17 + 25?")
            assert response.status_code == 503
            assert int(response.headers["retry-after"]) > 0
            assert model["reason"] in response.json()["error"]["message"]
            assert httpx.get(f"{daemon.url}/readyz").status_code == 503


def test_requests_wait_for_nothing_while_no_plan_is_ready(tmp_path: Path) -> None:
    """A node that is starting says 503 and Retry-After, and never hangs or lies."""
    daemon = Daemon(tmp_path, "anna")
    try:
        first = daemon.chat("What is 17 + 25?")
        assert first.status_code in (200, 503)
        if first.status_code == 503:
            assert int(first.headers["retry-after"]) > 0
        daemon.wait_status(serving_on(1), "serving alone")
        assert daemon.answer("What is 17 + 25?") == "42"
    finally:
        daemon.end()
