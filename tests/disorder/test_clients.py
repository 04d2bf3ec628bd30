"""How the clients of scripts/chaos judge what a node says, which here is a script's."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import msgspec
import pytest
import trio

from scripts.disorder import clients
from scripts.disorder.clients import Clients
from scripts.disorder.cluster import Cluster, Node
from scripts.disorder.ground import Spot
from scripts.disorder.questions import Answer, Question
from scripts.disorder.tally import Tally

QUESTION = Question(text="why?", tokens=9)
RIGHT = Answer(text="because", tokens=2, finish="stop")


def event(**content: object) -> bytes:
    return b"data: " + msgspec.json.encode(content) + b"\n\n"


def piece(text: str) -> bytes:
    return event(choices=[{"delta": {"content": text}, "finish_reason": None}])


STOP = event(choices=[{"delta": {}, "finish_reason": "stop"}])
USAGE = event(choices=[], usage={"prompt_tokens": 1, "completion_tokens": 2})
DONE = b"data: [DONE]\n\n"
OK = b"HTTP/1.1 200 OK\r\ncontent-type: text/event-stream\r\nconnection: close\r\n\r\n"
CHUNKED = b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nda"


def error(status: int, code: str | None) -> bytes:
    body = msgspec.json.encode({"error": {"message": "no", "code": code}})
    return b"HTTP/1.1 %d No\r\ncontent-length: %d\r\n\r\n%s" % (status, len(body), body)


@asynccontextmanager
async def saying(*scripts: bytes, root: Path) -> AsyncIterator[Cluster]:
    """A node for each script, which it says to whoever asks; an empty one takes no connection."""
    spots = []
    async with trio.open_nursery() as nursery:
        for script in scripts:
            [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
            port = listener.socket.getsockname()[1]

            async def answer(connection: trio.SocketStream, script: bytes = script) -> None:
                async with connection:
                    await connection.receive_some()
                    await connection.send_all(script)

            if script:
                nursery.start_soon(trio.serve_listeners, answer, [listener])
            else:
                await listener.aclose()
            spots.append(Spot(root, f"127.0.0.1:{port}", "127.0.0.1:0"))
        cluster = Cluster(root, spots, [8] * len(spots))
        for node in cluster.nodes:
            node.answers = True
        yield cluster
        nursery.cancel_scope.cancel()


async def once(cluster: Cluster) -> Tally:
    asking = Clients(cluster, {QUESTION: RIGHT}, 0, trio.current_time())
    asking.over.set()
    await asking._ask_any(cluster.nodes, 0, QUESTION)
    return asking.tally


@pytest.mark.parametrize(
    ("script", "outcome", "why"),
    [
        (OK + piece("be") + piece("cause") + STOP + USAGE + DONE, "finished", ""),
        (OK + piece("be") + piece("cast") + STOP + USAGE + DONE, "wrong", "becast"),
        (OK + piece("because") + STOP + DONE, "wrong", "tokens=0"),
        (OK + piece("because") + STOP + USAGE, "lost", "no [DONE]"),
        (OK + piece("be"), "lost", "no [DONE]"),
        (CHUNKED, "lost", "incomplete"),
        (b"", "lost", "connect"),
        (error(503, "not_ready"), "error", "503 not_ready"),
        (error(504, "deadline_exceeded"), "error", "504 deadline_exceeded"),
        (error(503, "deadline_exceeded"), "wrong", "503 deadline_exceeded"),
        (error(500, None), "wrong", "500 None"),
        (b"HTTP/1.1 502 No\r\ncontent-length: 2\r\n\r\nno", "wrong", "not an error object"),
        (
            OK + piece("be") + event(error={"message": "no", "code": "generation_failed"}),
            "error",
            "in the stream, generation_failed",
        ),
        (
            OK + piece("x") + event(error={"message": "", "code": "not_ready"}),
            "wrong",
            "'x' is not",
        ),
    ],
)
async def test_what_becomes_of_a_request(
    script: bytes, outcome: str, why: str, tmp_path: Path
) -> None:
    async with saying(script, root=tmp_path) as cluster:
        tally = await once(cluster)
    assert tally.outcomes == {outcome: 1}
    told = [ending.why for ending in tally.notable]
    assert (not told) == (outcome == "finished")
    assert all(why in each for each in told)


async def test_a_client_asks_another_node_where_its_own_is_gone(tmp_path: Path) -> None:
    right = OK + piece("because") + STOP + USAGE + DONE
    async with saying(b"", right, root=tmp_path) as cluster:
        cluster.nodes[0].answers = False
        tally = await once(cluster)
    assert (tally.sent, tally.elsewhere, tally.outcomes) == (1, 1, {"finished": 1})


async def test_a_node_that_dies_with_a_request_has_cut_it(tmp_path: Path) -> None:
    async with saying(CHUNKED, root=tmp_path) as cluster:
        cluster.nodes[0].answers = False
        tally = await once(cluster)
    assert tally.outcomes == {"cut": 1}


async def test_a_node_that_says_nothing_has_lost_the_request(
    tmp_path: Path, autojump_clock: trio.testing.MockClock
) -> None:
    listeners = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listeners[0].socket.getsockname()[1]
    cluster = Cluster(tmp_path, [Spot(tmp_path, f"127.0.0.1:{port}", "")], [8])
    cluster.nodes[0].answers = True
    tally = await once(cluster)
    assert [ending.why for ending in tally.notable] == [f"no end within {clients.PATIENCE_S:g} s"]
    for listener in listeners:
        await listener.aclose()


def test_a_frozen_node_is_frozen_until_it_goes_on(tmp_path: Path) -> None:
    node = Node("ann", tmp_path, Spot(tmp_path, "", ""), [])
    node.frozen = [(10.0, 20.0)]
    assert not node.is_frozen
    assert node.was_frozen(15, 16)
    assert node.was_frozen(5, 11)
    assert not node.was_frozen(20, 30)
    node.frozen.append((40.0, float("inf")))
    assert node.is_frozen
    assert node.was_frozen(50, 60)
