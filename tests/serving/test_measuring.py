"""What a serving cluster measures of itself and tells in its records, in virtual time."""

import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.records import StageReport

from .harness import FakeTokenizer, ServingCluster, reference
from .test_serving import NAMES, ask, prompt

PACE = {"a": 0.010, "b": 0.020, "c": 0.005}


def measuring(*names: str) -> ServingCluster:
    cluster = ServingCluster(*names)
    for name, node in cluster.nodes.items():
        node.pace = PACE[name]
    return cluster


def told(cluster: ServingCluster, name: str) -> StageReport:
    """What `name` says of its stage once it has had the occasion to say it."""
    node = cluster.nodes[name]
    node.stages.publish_figures(node.heads.figures())
    [report] = cluster.members[name].record.stages
    return report


async def one_answer(cluster: ServingCluster, stages: int, tokens: int = 60) -> None:
    """One request alone, with an answer of exactly that many tokens."""
    candidates = (f"question {number}" for number in range(1000))
    text = next(
        text
        for text in candidates
        if len(reference(FakeTokenizer().encode_chat(prompt(text)), tokens, stages)) == tokens
    )
    await ask(cluster.nodes["a"], text, tokens)


async def long_prompts(cluster: ServingCluster) -> None:
    for _ in range(3):
        await ask(cluster.nodes["a"], "x" * 201, 1)


async def test_a_stage_tells_how_long_it_takes_itself(clock: MockClock) -> None:
    async with measuring(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        assert told(cluster, "b").decode_s == 0
        await one_answer(cluster, stages=3)
        await long_prompts(cluster)
        for name in NAMES:
            assert told(cluster, name).decode_s == pytest.approx(PACE[name])
            assert told(cluster, name).prefill_s == pytest.approx(PACE[name])


async def test_the_head_tells_how_fast_the_pipeline_is(clock: MockClock) -> None:
    async with measuring(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        whole = sum(PACE.values())
        await long_prompts(cluster)
        await one_answer(cluster, stages=3)
        report = told(cluster, "a")
        assert report.token_s == pytest.approx(whole)
        assert report.ttft_tokens == 201
        # A prompt's last token is a step of its own, which need not wait for the others' way home.
        assert 200 * whole < report.ttft_s <= 201 * whole * 1.001
        assert 0 < report.tokens_per_s < 1 / whole
        assert told(cluster, "b").token_s == told(cluster, "c").token_s == 0


async def test_waiting_behind_other_steps_is_not_counted(clock: MockClock) -> None:
    async with measuring("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        async with trio.open_nursery() as nursery:
            for text in ("one", "two"):
                nursery.start_soon(ask, cluster.nodes["a"], text, 60)
        assert told(cluster, "a").decode_s == pytest.approx(PACE["a"])
        assert told(cluster, "b").decode_s == pytest.approx(PACE["b"])


async def test_with_company_only_the_throughput_counts(clock: MockClock) -> None:
    async with measuring("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        for _ in range(4):
            async with trio.open_nursery() as nursery:
                for _ in range(2):
                    nursery.start_soon(one_answer, cluster, 2)
        report = told(cluster, "a")
        assert (report.token_s, report.ttft_s) == (0, 0)
        # The slower stage is the bottleneck, and two steps in flight keep it busy.
        assert 0.7 / PACE["b"] < report.tokens_per_s < 1 / PACE["b"]


async def test_a_token_that_waited_behind_a_prompt_tells_nothing(clock: MockClock) -> None:
    async with measuring("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        async with trio.open_nursery() as nursery:
            nursery.start_soon(one_answer, cluster, 2)
            for _ in range(20):
                await long_prompts(cluster)
        assert told(cluster, "a").token_s in (0, pytest.approx(PACE["a"] + PACE["b"]))
        assert told(cluster, "a").prefill_s == pytest.approx(PACE["a"])


async def test_figures_are_told_sparingly(clock: MockClock) -> None:
    async with measuring("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        await one_answer(cluster, stages=1)
        assert told(cluster, "a").decode_s == pytest.approx(PACE["a"])
        cluster.nodes["a"].pace = 0.001
        for _ in range(5):
            await one_answer(cluster, stages=1)
        assert told(cluster, "a").decode_s == pytest.approx(PACE["a"]), "too soon"
        await trio.sleep(5)
        assert told(cluster, "a").decode_s == pytest.approx(0.001)


async def test_what_a_stage_measured_outlives_its_executor(clock: MockClock) -> None:
    async with measuring("a").running() as cluster:
        plan = cluster.publish("a")
        await cluster.ready(plan)
        await one_answer(cluster, stages=1)
        before = told(cluster, "a")
        cluster.nodes["a"].executors[0].die("killed by signal 9")
        await cluster.until(lambda: len(cluster.nodes["a"].executors) == 2)
        await cluster.ready(plan)
        assert told(cluster, "a").decode_s == before.decode_s > 0


async def test_a_stage_in_another_pipeline_keeps_only_its_own_figures(clock: MockClock) -> None:
    async with measuring(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        await one_answer(cluster, stages=2)
        before = told(cluster, "a")
        assert before.token_s > 0
        await cluster.ready(cluster.publish("a", "c"))
        after = told(cluster, "a")
        assert after.pipeline != before.pipeline
        assert after.decode_s == before.decode_s
        assert (after.token_s, after.tokens_per_s) == (0, 0)
