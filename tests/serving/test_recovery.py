"""What must end, end: failures that repeat, words that get lost, waits that are long."""

import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.plans import Epoch, ModelPlan, Plan
from pxd.engine.continuous import ContinuousConfig
from pxd.executors.protocol import ExecutorError
from pxd.serving import head, heads
from pxd.serving.answer import HOPELESS_S, PATIENCE_S
from pxd.serving.head import SUBMIT, Submission
from pxd.serving.requests import Generation, GenerationFailed, NotReady, RequestError
from pxd.wire import Buffer, Cancel, Nack, Output, Sampling, Step

from . import harness
from .harness import ServingCluster
from .test_serving import NAMES, ask, expected, prompt


async def test_a_step_that_always_fails_ends_its_request(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        tries = 0

        async def fail(step: Step, body: Buffer) -> Nack:
            nonlocal tries
            tries += 1
            return Nack(
                pipeline=step.pipeline,
                session=step.session,
                step=step.step,
                code="executor-failed",
                reason="no memory",
            )

        cluster.nodes["b"].executors[0].step = fail
        with pytest.raises(GenerationFailed, match="no memory"):
            await ask(cluster.nodes["a"], "hello")
        assert 2 <= tries <= 100
        cluster.nodes["b"].executors[-1].die("so that a good one takes its place")
        await cluster.until(lambda: len(cluster.nodes["b"].executors) == 2)
        assert (await ask(cluster.nodes["a"], "hello"))[0] == expected("hello", 20, 3)
        await cluster.until(lambda: cluster.nodes["c"].executors[0].caches == {})


async def test_an_executor_that_refuses_a_step_is_a_failure_like_any_other(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))

        async def refuse(step: Step, body: Buffer) -> None:
            raise ExecutorError("not today")

        cluster.nodes["b"].executors[0].step = refuse
        with pytest.raises(GenerationFailed, match="not today"):
            await ask(cluster.nodes["a"], "hello")


async def test_a_process_that_cannot_be_started_does_not_end_the_daemon(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        node = cluster.nodes["b"]
        good = node.stages.open_executor

        def no_process():
            raise OSError(11, "Resource temporarily unavailable")

        node.stages.open_executor = no_process
        plan = cluster.publish(*NAMES)
        await cluster.until(
            lambda: [stage.state for stage in cluster.members["b"].record.stages] == ["failed"]
        )
        node.stages.open_executor = good
        await cluster.ready(plan)
        assert (await ask(cluster.nodes["a"], "hello"))[0] == expected("hello", 20, 3)


async def test_after_a_quiet_time_too_a_restart_is_waited_for(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        await trio.sleep(3600)
        cluster.nodes["b"].executors[0].die("killed by signal 9")
        await cluster.until(lambda: cluster.members["b"].record.stages[0].state == "restarting")
        assert (await ask(cluster.nodes["a"], "hello"))[0] == expected("hello", 20, 3)


async def test_a_long_prefill_is_not_taken_for_a_stall(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CONTEXT", 40_000)
    monkeypatch.setattr(
        head,
        "ContinuousConfig",
        lambda **options: ContinuousConfig(**{**options, "kv_tokens": 64_000}),
    )
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        executor = cluster.nodes["b"].executors[0]
        run = executor.step

        async def slow(step: Step, body: Buffer):
            await trio.sleep(sum(row.count for row in step.rows) / 50)
            return await run(step, body)

        executor.step = slow
        began = trio.current_time()
        generation = Generation(max_tokens=5, temperature=0)
        node = cluster.nodes["a"]
        async with await node.ingress.chat(None, prompt("x" * 20_000), generation) as answer:
            assert sum([delta.tokens async for delta in answer]) == 5
        assert trio.current_time() - began > 400
        assert answer.recoveries == 0


async def test_a_cancellation_that_overtakes_its_submission(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        plan = cluster.publish(*NAMES)
        await cluster.ready(plan)
        network = cluster.nodes["c"].network
        await network.send("a", Cancel(request="x.1"))
        submission = Submission(
            pipeline=plan.models[0].pipelines[0].id,
            request="x.1",
            tokens=(1, 2),
            generated=0,
            max_new=400,
            sampling=Sampling(temperature=0),
            eos=(),
        )
        await network.call("a", SUBMIT, submission, timeout=5)
        await cluster.until(lambda: cluster.nodes["a"].heads.running == 0)
        outputs = [frame for _, _, frame in cluster.frames if isinstance(frame, Output)]
        assert sum(len(output.tokens) for output in outputs) < 100


async def test_a_lost_connection_to_the_head_costs_a_pause(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        node = cluster.nodes["c"]
        node.network.on_peer(lambda peer, up: up or node.ingress.connection_lost(peer))
        generation = Generation(max_tokens=30, temperature=0)
        async with await node.ingress.chat(None, prompt("cut"), generation) as answer:
            text = ""
            async for delta in answer:
                text += delta.text
                if text.count("[") == 5:
                    cluster.hub.cut("c", "a")
                    cluster.hub.heal("c", "a")
        assert text == expected("cut", 30, 2)
        assert answer.recoveries == 1


async def test_another_model_ends_an_answer_in_words(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        generation = Generation(max_tokens=200, temperature=0)
        async with await cluster.nodes["a"].ingress.chat(None, prompt("hi"), generation) as answer:
            deltas = aiter(answer)
            await anext(deltas)
            other = ModelPlan(name="other", state="failed", reason="?")
            for node in cluster.nodes.values():
                node.take(Plan(Epoch(2, "a", 1), (other,)))
            with pytest.raises(GenerationFailed, match="not served"):
                [delta async for delta in deltas]


async def test_without_max_tokens_an_answer_takes_what_room_there_is(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CONTEXT", 8192)
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        text, finish = await ask(cluster.nodes["a"], "hello", None)
        assert (text, finish) == (expected("hello", 5000, 1), "stop")


async def begun(cluster: ServingCluster, tokens: int) -> tuple[float, str, Exception | None]:
    """A request at c to a pipeline on a, which is lost after so many tokens; what becomes of it.

    Returns the seconds from then on, the text, and how it ended.
    """
    await cluster.ready(cluster.publish("a"))
    if not tokens:
        cluster.nodes["a"].gate = trio.Event()
    generation = Generation(max_tokens=30, temperature=0)
    lost_at, text = 0.0, ""
    failure: RequestError | None = None
    async with await cluster.nodes["c"].ingress.chat(None, prompt("far"), generation) as answer:
        if not tokens:
            await cluster.kill("a")
            lost_at = trio.current_time()
        try:
            async for delta in answer:
                text += delta.text
                if text.count("[") == tokens:
                    await cluster.kill("a")
                    lost_at = trio.current_time()
        except RequestError as error:
            failure = error
    return trio.current_time() - lost_at, text, failure


async def test_without_a_token_a_request_is_refused_once_there_is_no_hope(clock: MockClock) -> None:
    async with ServingCluster("a", "c").running() as cluster:
        seconds, text, error = await begun(cluster, 0)
        assert isinstance(error, NotReady)
        assert "a is dead" in str(error)
        assert (text, seconds) == ("", pytest.approx(HOPELESS_S, abs=3))
        # New ones, too, while it would be no wonder if somebody came back.
        began = trio.current_time()
        with pytest.raises(NotReady, match="a is dead"):
            await ask(cluster.nodes["c"], "new")
        assert trio.current_time() - began == pytest.approx(HOPELESS_S, abs=3)


async def test_an_answer_that_has_begun_waits_longer(clock: MockClock) -> None:
    async with ServingCluster("a", "c").running() as cluster:
        seconds, text, error = await begun(cluster, 5)
        assert expected("far", 30, 1).startswith(text)
        assert isinstance(error, GenerationFailed)
        assert seconds == pytest.approx(PATIENCE_S, abs=3)


async def test_whatever_comes_back_in_time_is_waited_for(clock: MockClock) -> None:
    for tokens in (0, 5):
        async with (
            ServingCluster("a", "c").running() as cluster,
            trio.open_nursery() as nursery,
        ):

            async def come_back(cluster: ServingCluster = cluster) -> None:
                await cluster.until(lambda: cluster.members["a"].state == "dead")
                await trio.sleep(20)
                cluster.publish("c")

            nursery.start_soon(come_back)
            seconds, text, error = await begun(cluster, tokens)
            assert (text, error) == (expected("far", 30, 1), None)
            assert 19 < seconds < 30


async def test_what_a_dead_ingress_left_behind_is_not_taken_out_on_the_next_one(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is dead and back while its last tokens are still to be tried once more."""
    monkeypatch.setattr(heads, "OUTPUT_RETRIES_S", (0.1, 10.0))
    async with ServingCluster("a", "c").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        head_node, ingress = cluster.nodes["a"], cluster.nodes["c"]
        head_node.pace = 1.0
        generation = Generation(max_tokens=30, temperature=0)
        async with await ingress.ingress.chat(None, prompt("gone"), generation) as answer:
            await anext(aiter(answer))
            cluster.hub.cut("c", "a")
            await trio.sleep(3)
            head_node.heads.peer_gone("c")
        cluster.hub.heal("c", "a")
        async with await ingress.ingress.chat(None, prompt("back"), generation) as answer:
            assert "".join([delta.text async for delta in answer]) == expected("back", 30, 1)
        assert answer.recoveries == 0
