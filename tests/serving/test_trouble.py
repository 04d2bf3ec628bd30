"""Executors in trouble: no memory, wrong numbers, hangs, deaths without end."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.cluster.members import Member
from pxd.cluster.records import NodeRecord, StageReport, Unfit
from pxd.executors.protocol import ExecutorDied
from pxd.serving.fitness import DEATHS, FAILED_LOADS, PAUSES_S
from pxd.serving.head import CAUTION_S
from pxd.serving.requests import Generation, GenerationFailed
from pxd.serving.view import node_views
from pxd.wire import Buffer, Nack, NackCode, Output, Sampled, Step

from . import harness
from .harness import ArithmeticExecutor, ServingCluster, ServingNode
from .test_serving import NAMES, ask, expected, prompt


def nack(step: Step, code: NackCode, reason: str) -> Nack:
    rows = tuple(row.request for row in step.rows)
    return Nack(
        pipeline=step.pipeline,
        session=step.session,
        step=step.step,
        code=code,
        reason=reason,
        requests=rows,
    )


class Frail(ArithmeticExecutor):
    """Fails steps as `code_for` says, and loses their requests, as an engine does."""

    failed = 0

    def code_for(self, step: Step) -> NackCode | None:
        raise NotImplementedError

    async def step(self, step: Step, body: Buffer) -> Sampled | Nack | tuple[Step, Buffer]:
        await self.release(step.releases)
        known = {*self.caches, *(opening.request for opening in step.openings)}
        if any(row.request not in known for row in step.rows):
            return nack(step, "unknown-request", "never heard of it")
        code = self.code_for(step)
        if code is None:
            return await super().step(step, body)
        self.failed += 1
        for row in step.rows:
            self.caches.pop(row.request, None)
        return nack(step, code, "layers [2, 4): why")


class Cramped(Frail):
    """Has memory for steps of `most` positions."""

    most = 20

    def code_for(self, step: Step) -> NackCode | None:
        return "out-of-memory" if sum(row.count for row in step.rows) > self.most else None


class Starved(Cramped):
    most = 0


class WrongOnce(Frail):
    def code_for(self, step: Step) -> NackCode | None:
        return "not-finite" if step.rows and not self.failed else None


async def test_steps_without_memory_cost_no_request_and_no_token(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        cluster.nodes["b"].executor_type = Cramped
        await cluster.ready(cluster.publish(*NAMES))
        answers: dict[str, str] = {}

        async def one(node: ServingNode, text: str) -> None:
            generation = Generation(max_tokens=20, temperature=0)
            async with await node.ingress.chat("sums", prompt(text), generation) as answer:
                answers[text] = "".join([delta.text async for delta in answer])
                assert answer.recoveries == 0

        async with trio.open_nursery() as nursery:
            for number in range(12):
                text = f"question {number} " * (1 + number % 5)
                nursery.start_soon(one, cluster.nodes[NAMES[number % 3]], text)
        assert answers == {text: expected(text, 20, 3) for text in answers}
        assert len(answers) == 12
        node = cluster.nodes["b"]
        executor = node.executors[0]
        assert isinstance(executor, Cramped)
        node.stages.publish_figures({})
        [report] = cluster.members["b"].record.stages
        assert report.out_of_memory == executor.failed > 0
        # Steps in flight may fail together, but nobody tries for long what cannot be.
        assert executor.failed < 15
        await cluster.until(lambda: executor.caches == {})


class Killed(ArithmeticExecutor):
    """The system kills it for a step of more than 600 positions."""

    async def step(self, step: Step, body: Buffer) -> Sampled | Nack | tuple[Step, Buffer]:
        if sum(row.count for row in step.rows) > 600:
            self.die("killed by SIGKILL (out of memory?)")
        return await super().step(step, body)


async def test_after_a_death_in_a_step_smaller_ones_are_tried(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(harness, "CONTEXT", 4000)
    async with ServingCluster("a").running() as cluster:
        node = cluster.nodes["a"]
        node.executor_type = Killed
        await cluster.ready(cluster.publish("a"))
        text = "x" * 3000
        assert (await ask(node, text, 10))[0] == expected(text, 10, 1)
        assert len(node.executors) == 2, "4096 positions, then 256"
        await trio.sleep(CAUTION_S)
        node.executors[-1].die("killed by signal 9")
        await cluster.until(lambda: len(node.executors) == 3)
        await cluster.ready(node.plan)
        assert (await ask(node, "y" * 500, 10))[0] == expected("y" * 500, 10, 1)
        assert node.executors[-1].steps < 14, "a prompt of 500 in one step again"


async def test_who_has_no_memory_for_the_smallest_step_fails_and_says_why(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        cluster.nodes["b"].executor_type = Starved
        await cluster.ready(cluster.publish(*NAMES))
        with pytest.raises(GenerationFailed, match=r"out-of-memory: b: layers \[2, 4\): why"):
            await ask(cluster.nodes["a"], "hello")


async def test_wrong_numbers_are_named_and_counted(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        node = cluster.nodes["b"]
        node.executor_type = WrongOnce
        await cluster.ready(cluster.publish(*NAMES))
        assert (await ask(cluster.nodes["a"], "hello"))[0] == expected("hello", 20, 3)
        node.stages.publish_figures({})
        [report] = cluster.members["b"].record.stages
        assert (report.not_finite, report.out_of_memory) == (1, 0)
        failures = [frame.failure for *_, frame in cluster.frames if isinstance(frame, Output)]
        assert "not-finite: b: layers [2, 4): why" in failures


async def test_a_hang_is_a_death_that_is_counted_apart(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        executor = cluster.nodes["b"].executors[0]
        executor.hung = True
        executor.die("no answer for 30 s, so it was killed")
        await cluster.until(lambda: cluster.members["b"].record.stages[0].restarts == 1)
        assert cluster.members["b"].record.stages[0].hangs == 1
        await cluster.until(lambda: cluster.members["b"].record.stages[0].state == "ready")
        assert (await ask(cluster.nodes["a"], "hello"))[0] == expected("hello", 20, 3)
        cluster.nodes["b"].executors[1].die("killed by signal 9")
        await cluster.until(lambda: cluster.members["b"].record.stages[0].restarts == 2)
        assert cluster.members["b"].record.stages[0].hangs == 1


class DiesAtOnce(ArithmeticExecutor):
    async def load(self, spec: object, progress: object) -> None:  # type: ignore[override]
        raise ExecutorDied("killed by signal 9")


async def test_an_executor_that_keeps_dying_makes_its_node_unfit_for_a_while(
    clock: MockClock,
) -> None:
    async with ServingCluster("a").running() as cluster:
        node = cluster.nodes["a"]
        node.executor_type = DiesAtOnce
        cluster.publish("a")
        await cluster.until(lambda: node.stages.unfit())
        assert len(node.executors) == DEATHS
        [unfit] = node.stages.unfit()
        assert unfit.model == "sums"
        assert "killed by signal 9" in unfit.reason
        began = trio.current_time()
        node.executor_type = ArithmeticExecutor
        await cluster.until(lambda: not node.stages.unfit())
        assert trio.current_time() - began == pytest.approx(PAUSES_S[0], abs=1)


async def test_loads_that_keep_failing_make_it_unfit_until_somebody_has_seen_to_it(
    clock: MockClock,
) -> None:
    async with ServingCluster("a").running() as cluster:
        node = cluster.nodes["a"]
        node.refuse_load = "no such file"
        plan = cluster.publish("a")
        await cluster.until(lambda: node.stages.unfit())
        assert len(node.executors) == FAILED_LOADS
        assert "no such file" in node.stages.unfit()[0].reason
        node.refuse_load = ""
        node.stages.forgive()
        assert node.stages.unfit() == ()
        await cluster.ready(plan)


async def test_a_stage_that_falls_behind_is_slow_and_its_figures_stay(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        node = cluster.nodes["b"]
        node.pace = 0.05
        for number in range(10):
            await ask(cluster.nodes["a"], f"question {number}", 40)
        node.stages.publish_figures({})
        assert node.stages.slow() == 0
        [usual] = cluster.members["b"].record.stages
        assert usual.decode_s == pytest.approx(0.05, rel=0.1)
        node.pace = 0.5
        for number in range(10):
            await ask(cluster.nodes["a"], f"question {number}", 40)
        await trio.sleep(10)
        node.stages.publish_figures({})
        [report] = cluster.members["b"].record.stages
        assert report.slow == pytest.approx(10, rel=0.2)
        assert report.decode_s == usual.decode_s
        assert node.stages.slow() == report.slow
        assert cluster.nodes["a"].stages.slow() == 0
        cluster.publish("a")
        await cluster.until(lambda: cluster.members["b"].record.stages == ())
        assert node.stages.slow() == report.slow
        node.stages.forgive()
        assert node.stages.slow() == 0


def test_status_says_what_keeps_a_node_from_its_part_and_what_to_do() -> None:
    record = NodeRecord(
        id="b", name="ben", unfit=(Unfit("sums", "it dies; it tries again in 1 min"),), slow=4.0
    )
    slow_now = StageReport(model="m", pipeline="p", start=0, end=1, state="ready", slow=4.0)
    views = [
        node_views(
            {"b": Member(each, "alive", 0.0, 1)},
            0.0,
            own_id="a",
            routes={},
            bandwidths={},
            refused="",
        )[0]
        for each in (record, replace(record, stages=(slow_now,), unfit=()))
    ]
    assert views[0].unfit == ["sums"]
    assert "it leaves sums to others" in views[0].problem
    assert "`pxd resume ben`" in views[0].problem
    assert "4 times slower than usual" in views[0].problem
    assert (views[1].problem, views[1].slow, views[1].stages[0].slow) == ("", 4.0, 4.0)
