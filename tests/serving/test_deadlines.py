"""A request that is not done in time ends with the reason, wherever it is."""

import json

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.serving.head import Head, Submission
from pxd.serving.requests import DeadlineExceeded, Generation, NotReady
from pxd.wire import Output

from .harness import ServingCluster
from .http_harness import BOTH, serving
from .test_serving import ask, expected, prompt


@BOTH
async def test_before_the_first_piece_it_is_an_http_error(stream: bool) -> None:
    async with serving("abc") as client:
        client.node.gate = trio.Event()
        response = await client.ask(stream=stream, timeout=1)
        assert response.status_code == 504
        assert response.headers["x-should-retry"] == "false"
        error = response.json()["error"]
        assert (error["type"], error["code"]) == ("server_error", "deadline_exceeded")
        assert "not done within 1 s" in error["message"]
        assert "deadline: its time was over while it was being worked on" in error["message"]
        assert client.node.heads.running == 0
        client.node.gate.set()
        assert (await client.answer(stream=stream)).text == "abc"


async def test_in_mid_stream_it_is_an_event_and_the_end() -> None:
    async with serving("one two three", hangs_at=4) as client:
        response = await client.ask(stream=True, timeout=2)
    assert response.status_code == 200
    *pieces, error = [
        json.loads(event.removeprefix("data: "))
        for event in response.text.removesuffix("\n\n").split("\n\n")
    ]
    assert "one two three".startswith(
        "".join(piece["choices"][0]["delta"]["content"] for piece in pieces)
    )
    assert all(piece["choices"][0]["finish_reason"] is None for piece in pieces)
    assert error["error"]["code"] == "deadline_exceeded"
    assert "with 4 tokens generated" in error["error"]["message"]


async def test_an_answer_cut_off_is_no_whole_answer() -> None:
    async with serving("one two three", hangs_at=4) as client:
        response = await client.ask(timeout=2)
    assert response.status_code == 504
    assert "with 4 tokens generated" in response.json()["error"]["message"]


@pytest.fixture
def submissions(monkeypatch: pytest.MonkeyPatch) -> list[Submission]:
    """All that any head is given."""
    seen: list[Submission] = []
    submit = Head.submit

    def record(self: Head, peer: str, submission: Submission):
        seen.append(submission)
        return submit(self, peer, submission)

    monkeypatch.setattr(Head, "submit", record)
    return seen


async def test_priority_and_client_reach_the_head(submissions: list[Submission]) -> None:
    async with serving("abc") as client:
        for user in ("anna", "ben", "anna"):
            await client.ask(priority=-3, timeout=30, user=user)
        await client.ask()
    assert [submission.priority for submission in submissions] == [-3, -3, -3, 0]
    anna, ben, again, nobody = [submission.client for submission in submissions]
    assert anna == again
    assert len({anna, ben, nobody}) == 3
    assert not any("anna" in client for client in (anna, ben, nobody))
    assert all(0 < submission.timeout <= 30 for submission in submissions[:3])
    assert 30 < submissions[3].timeout <= 3600


async def test_waiting_for_its_turn(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        node, head = cluster.nodes["a"], cluster.nodes["b"]
        head.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            for number in range(20):
                nursery.start_soon(ask, node, f"first {number}" * 50, 20)
            await cluster.until(lambda: head.heads.running + head.heads.waiting == 20)
            waiting = head.heads.waiting
            assert waiting > 0
            with pytest.raises(DeadlineExceeded, match=r"within 5 s.*waiting for its turn"):
                await ask(node, "second" * 50, 20, timeout=5)
            assert head.heads.waiting == waiting
            head.gate.set()


async def test_the_time_goes_on_while_a_request_is_brought_elsewhere(
    clock: MockClock, submissions: list[Submission]
) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        executor = cluster.nodes["b"].executors[0]
        cluster.nodes["b"].pace = 1.0
        generation = Generation(max_tokens=20, temperature=0, timeout=100)
        node = cluster.nodes["a"]
        async with await node.ingress.chat(None, prompt("x"), generation) as answer:
            text = ""
            async for delta in answer:
                text += delta.text
                if text.count("[") == 10 and answer.recoveries == 0:
                    executor.die("killed by signal 9")
        assert text == expected("x", 20, 1)
        first, second = submissions
        assert first.timeout == 100
        assert second.timeout < 91


async def test_a_recovery_ends_with_the_deadline(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        cluster.nodes["b"].pace = 1.0
        began = trio.current_time()
        generation = Generation(max_tokens=500, temperature=0, timeout=30)
        async with await cluster.nodes["a"].ingress.chat(None, prompt("x"), generation) as answer:
            deltas = aiter(answer)
            await anext(deltas)
            await cluster.kill("b")
            with pytest.raises(DeadlineExceeded, match=r"within 30 s: .*b is dead"):
                await anext(deltas)
        assert trio.current_time() - began <= 30 + 1


async def test_a_head_that_says_nothing_is_not_waited_for(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        node = cluster.nodes["a"]
        node.ingress.output = lambda peer, frame: None  # type: ignore[method-assign]
        began = trio.current_time()
        with pytest.raises(DeadlineExceeded, match="no word"):
            await ask(node, "x", 400, timeout=10)
        assert 10 <= trio.current_time() - began < 12
        await cluster.until(lambda: cluster.nodes["b"].heads.running == 0)


async def test_the_daemon_has_a_limit_of_its_own(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        node.ingress._request_timeout = 7.0
        node.gate = trio.Event()
        for timeout in (None, 100.0):
            with pytest.raises(DeadlineExceeded, match="within 7 s"):
                await ask(node, "x", 400, timeout=timeout)


async def test_who_reads_slowly_gets_what_was_done_in_time(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        generation = Generation(max_tokens=20, temperature=0, timeout=10)
        async with await cluster.nodes["a"].ingress.chat(None, prompt("x"), generation) as answer:
            text = ""
            async for delta in answer:
                await trio.sleep(5)
                text += delta.text
        assert text == expected("x", 20, 1)
        assert answer.recoveries == 0


async def test_no_pipeline_in_time(clock: MockClock) -> None:
    """One that was ready a moment ago is waited for, but not beyond the deadline."""
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        node.refuse_load = "the disk is gone"
        node.executors[-1].die("killed by signal 9")
        await cluster.until(lambda: cluster.members["a"].record.stages[0].state != "ready")
        with pytest.raises(DeadlineExceeded, match="within 10 s"):
            await ask(node, "x", timeout=10)
        await trio.sleep(300)
        with pytest.raises(NotReady, match="the disk is gone"):
            await ask(node, "x", timeout=10)


async def test_who_says_how_long_it_can_wait_waits_for_a_pipeline(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster, trio.open_nursery() as nursery:
        node = cluster.nodes["b"]
        with pytest.raises(NotReady, match="no plan yet"):
            await ask(node, "x")
        with pytest.raises(DeadlineExceeded, match=r"within 3 s: .*no plan yet"):
            await ask(node, "x", timeout=3)
        answers: list[str] = []

        async def wait() -> None:
            answers.append((await ask(node, "x", timeout=100))[0])

        nursery.start_soon(wait)
        await trio.sleep(50)
        plan = cluster.make_plan("a")
        nowhere = replace(plan.models[0], pipelines=(), state="waiting", reason="too little memory")
        for each in cluster.nodes.values():
            each.take(replace(plan, models=(nowhere,)))
        nursery.start_soon(wait)
        with pytest.raises(DeadlineExceeded, match=r"within 20 s: .*too little memory"):
            await ask(node, "x", timeout=20)
        assert answers == []
        await cluster.ready(cluster.publish("a"))
        await cluster.until(lambda: len(answers) == 2)
        assert set(answers) == {expected("x", 20, 1)}


async def test_nobody_waits_for_what_will_not_come(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        node = cluster.nodes["a"]
        plan = cluster.make_plan("a")
        failed = replace(plan.models[0], pipelines=(), state="failed", reason="it is broken")
        for models, why in (((), "no model is chosen"), ((failed,), "it is broken")):
            node.take(replace(plan, models=models))
            began = trio.current_time()
            with pytest.raises(NotReady, match=why):
                await ask(node, "x", timeout=100)
            assert trio.current_time() == began


async def test_every_request_of_a_pipeline_may_end_at_once(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        node.gate = trio.Event()
        over = 0

        async def one(number: int) -> None:
            nonlocal over
            with pytest.raises(DeadlineExceeded, match="its time was over while"):
                await ask(node, f"{number}", 400, timeout=50)
            over += 1

        async with trio.open_nursery() as nursery:
            for number in range(1000):
                nursery.start_soon(one, number)
        assert over == 1000
        assert node.heads.running + node.heads.waiting == 0
        failures = [f for _, _, f in cluster.frames if isinstance(f, Output) and f.failure]
        assert len(failures) == 1000
