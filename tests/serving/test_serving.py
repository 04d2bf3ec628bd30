"""Ingress, head and stages together, in virtual time."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.cluster.plans import StagePlan
from pxd.p2p.network import CallFailed
from pxd.serving.head import SUBMIT, Submission
from pxd.serving.requests import (
    Generation,
    GenerationFailed,
    InvalidRequest,
    Message,
    NotReady,
    UnknownModel,
)
from pxd.wire import Output, Sampling, Step, Tensor

from .harness import LAYERS, FakeTokenizer, ServingCluster, ServingNode, reference

NAMES = ("a", "b", "c")


def prompt(text: str) -> tuple[Message, ...]:
    return (Message("user", text),)


def expected(text: str, count: int, stages: int) -> str:
    tokenizer = FakeTokenizer()
    return tokenizer.add(reference(tokenizer.encode_chat(prompt(text)), count, stages))


async def ask(
    node: ServingNode, text: str, count: int | None = 20, **options: object
) -> tuple[str, str | None]:
    generation = Generation(max_tokens=count, temperature=0, **options)
    async with await node.ingress.chat("sums", prompt(text), generation) as answer:
        pieces, finish = [], None
        async for delta in answer:
            pieces.append(delta.text)
            finish = delta.finish
        return "".join(pieces), finish


@pytest.mark.parametrize("size", [1, 2, 3])
async def test_any_node_answers(size: int, clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES[:size]))
        for node in cluster.nodes.values():
            assert (await ask(node, "hello"))[0] == expected("hello", 20, size)


async def test_many_requests_at_once(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        answers: dict[str, str] = {}

        async def one(node: ServingNode, text: str) -> None:
            answers[text] = (await ask(node, text, 40))[0]

        async with trio.open_nursery() as nursery:
            for number in range(24):
                node = cluster.nodes[NAMES[number % 3]]
                nursery.start_soon(one, node, f"question {number}")
        assert answers == {text: expected(text, 40, 3) for text in answers}
        assert len(answers) == 24
        batches = [len(f.rows) for _, to, f in cluster.frames if to == "b" and isinstance(f, Step)]
        assert max(batches) > 1, "requests share steps"


async def test_a_client_that_leaves_frees_its_request_on_every_stage(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        generation = Generation(max_tokens=400, temperature=0)
        async with await cluster.nodes["b"].ingress.chat(None, prompt("x"), generation) as answer:
            async for delta in answer:
                if delta.tokens:
                    break
        await cluster.until(
            lambda: not any(node.executors[0].caches for node in cluster.nodes.values())
        )
        assert cluster.nodes["a"].heads.running == 0


async def test_the_cluster_hears_of_kv_blocks_held_and_given_back(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        head = cluster.nodes["a"]

        def told(held: int) -> bool:
            head.stages.tell_blocks(head.heads.blocks())
            reports = [cluster.members[name].record.stages[0] for name in NAMES]
            kv = reports[0].kv
            assert [report.kv for report in reports[1:]] == [None, None]
            same = {report.kv_held for report in reports} == {held}
            return kv is not None and kv.total - kv.free == held and same

        assert told(0)
        generation = Generation(max_tokens=400, temperature=0)
        async with await cluster.nodes["b"].ingress.chat(None, prompt("x"), generation) as answer:
            async for delta in answer:
                if delta.tokens:
                    cluster.nodes["c"].gate = trio.Event()
                    break
            await cluster.until(lambda: told(1))
        cluster.nodes["c"].gate.set()
        await cluster.until(lambda: told(0))


async def leave_amid_an_answer(node: ServingNode) -> None:
    generation = Generation(max_tokens=400, temperature=0)
    async with await node.ingress.chat(None, prompt("x"), generation) as answer:
        async for delta in answer:
            if delta.tokens:
                return


async def test_stages_forget_requests_whose_pipeline_fell_apart(clock: MockClock) -> None:
    """Though nobody asks for anything afterwards."""
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        cluster.nodes["c"].gate = trio.Event()
        first = cluster.nodes["a"].executors[0]
        async with trio.open_nursery() as nursery:
            nursery.start_soon(leave_amid_an_answer, cluster.nodes["b"])
            await cluster.until(lambda: len(first.caches) == 1)
            nursery.cancel_scope.cancel()
        cluster.nodes["c"].executors[0].die("killed by signal 9")
        cluster.nodes["c"].gate.set()
        await cluster.until(lambda: not first.caches)
        assert cluster.nodes["a"].executors == [first]


async def test_a_stage_that_becomes_a_spare_forgets_its_requests(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        [executor] = node.executors
        generation = Generation(max_tokens=400, temperature=0)
        async with await cluster.nodes["b"].ingress.chat(None, prompt("x"), generation) as answer:
            async for delta in answer:
                if delta.tokens:
                    node.gate = trio.Event()
                    break
            assert executor.caches
            plan = cluster.make_plan("b")
            spare = StagePlan(node="a", start=0, end=LAYERS)
            plan = replace(plan, models=(replace(plan.models[0], spares=(spare,)),))
            for each in cluster.nodes.values():
                each.take(plan)
        node.gate.set()
        await cluster.until(lambda: not executor.caches)
        assert node.executors == [executor]


async def test_an_executor_that_dies_costs_a_pause(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        for victim in NAMES:
            node = cluster.nodes["c"]
            generation = Generation(max_tokens=30, temperature=0)
            async with await node.ingress.chat(None, prompt("bang"), generation) as answer:
                text = ""
                async for delta in answer:
                    text += delta.text
                    if text.count("[") == 5:
                        cluster.nodes[victim].executors[-1].die("killed by signal 9")
            assert text == expected("bang", 30, 3)
            assert answer.recoveries == 1
            report = cluster.members[victim].record.stages[0]
            assert (report.state, report.restarts) == ("ready", 1)


async def test_the_next_request_after_an_executor_death_waits_for_the_restart(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        cluster.nodes["b"].executors[-1].die("killed by signal 9")
        await cluster.until(lambda: cluster.members["b"].record.stages[0].state == "restarting")
        assert (await ask(cluster.nodes["a"], "again"))[0] == expected("again", 20, 3)


@pytest.mark.parametrize("victim", ["a", "b"])
async def test_a_dead_node_costs_a_pause(victim: str, clock: MockClock) -> None:
    """The head or a stage dies; the next plan does without it and the answer goes on."""
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        generation = Generation(max_tokens=30, temperature=0)
        node = cluster.nodes["c"]
        async with await node.ingress.chat(None, prompt("bye"), generation) as answer:
            tokens = 0
            async for delta in answer:
                tokens += delta.tokens
                if tokens == 5:
                    await cluster.kill(victim)
                    rest = [name for name in NAMES if name != victim]
                    cluster.publish(*rest)
                if delta.finish:
                    break
        assert tokens == 30
        assert answer.recoveries >= 1


async def test_a_plan_that_keeps_a_pipeline_leaves_its_requests_alone(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        generation = Generation(max_tokens=30, temperature=0)
        node = cluster.nodes["b"]
        async with await node.ingress.chat(None, prompt("same"), generation) as answer:
            text = ""
            async for delta in answer:
                text += delta.text
                if text.count("[") == 10:
                    cluster.publish(*NAMES)
        assert text == expected("same", 30, 3)
        assert answer.recoveries == 0
        assert all(len(node.executors) == 1 for node in cluster.nodes.values())


async def test_a_new_chain_keeps_executors_whose_layers_stay(clock: MockClock) -> None:
    async with ServingCluster(*NAMES, "d").running() as cluster:
        await cluster.ready(cluster.publish("a", "b", "c"))
        await cluster.ready(cluster.publish("a", "d", "c"))
        assert (await ask(cluster.nodes["b"], "moved"))[0] == expected("moved", 20, 3)
        assert [len(cluster.nodes[name].executors) for name in "abcd"] == [1, 1, 1, 1]
        assert cluster.members["b"].record.stages == ()


async def test_a_request_that_kills_executors_is_stopped(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        node.pace = 3600.0

        async def poison() -> None:
            while True:
                count = len(node.executors)
                await cluster.until(lambda: cluster.nodes["a"].heads.running > 0)
                node.executors[-1].die("out of memory")
                await cluster.until(lambda count=count: len(node.executors) > count)

        async with trio.open_nursery() as nursery:
            nursery.start_soon(poison)
            with pytest.raises(GenerationFailed, match=r"2 executor deaths.*out of memory"):
                await ask(node, "poison")
            assert len(node.executors) == 2
            nursery.cancel_scope.cancel()


async def test_a_stage_that_cannot_load_says_why_and_tries_again(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        cluster.nodes["b"].refuse_load = "the file is damaged"
        plan = cluster.publish(*NAMES)
        await cluster.until(
            lambda: [s.state for s in cluster.members["b"].record.stages] == ["failed"]
        )
        with pytest.raises(NotReady, match=r"b, layers \[2, 4\): the file is damaged"):
            await ask(cluster.nodes["a"], "early")
        cluster.nodes["b"].refuse_load = ""
        await cluster.ready(plan)
        assert (await ask(cluster.nodes["a"], "late"))[0] == expected("late", 20, 3)


async def test_stop_strings_end_the_answer_and_free_it(clock: MockClock) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        await cluster.ready(cluster.publish(*NAMES))
        full = expected("stopping", 20, 3)
        stop = full.split("]")[6] + "]"
        text, finish = await ask(cluster.nodes["a"], "stopping", 400, stop=(stop,))
        assert (text, finish) == (full[: full.index(stop)], "stop")
        await cluster.until(
            lambda: not any(node.executors[0].caches for node in cluster.nodes.values())
        )


async def test_requests_that_cannot_be(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        node = cluster.nodes["a"]
        with pytest.raises(NotReady, match="no plan yet"):
            await ask(node, "x")
        await cluster.ready(cluster.publish("a"))
        with pytest.raises(UnknownModel, match="serves sums"):
            await node.ingress.chat("other", prompt("x"), Generation())
        with pytest.raises(InvalidRequest, match="context of 512"):
            await ask(node, "x" * 512)
        text, finish = await ask(node, "x" * 510, 50)
        assert finish == "length"
        assert text == expected("x" * 510, 2, 1)


async def test_a_head_refuses_what_it_cannot_hold(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        plan = cluster.publish("a")
        await cluster.ready(plan)
        submission = Submission(
            pipeline=plan.models[0].pipelines[0].id,
            request="r",
            tokens=(1,) * 5000,
            generated=0,
            max_new=1,
            sampling=Sampling(temperature=0),
            eos=(),
        )
        with pytest.raises(CallFailed, match="holds 4096") as caught:
            await cluster.nodes["b"].network.call("a", SUBMIT, submission, timeout=5)
        assert caught.value.code == "never-fits"


async def test_steps_from_anybody_but_the_stage_before_are_dropped(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES, "x").running() as cluster:
        plan = cluster.publish(*NAMES)
        await cluster.ready(plan)
        forged = Step(
            pipeline=plan.models[0].pipelines[0].id,
            session=1,
            step=0,
            rows=(),
            tensor=Tensor("f32", (0,)),
            releases=(0,),
        )
        for forger in ("x", "c"):
            await cluster.nodes[forger].network.send("b", forged)
        assert (await ask(cluster.nodes["b"], "fine"))[0] == expected("fine", 20, 3)
        assert not any(
            to == "c" and isinstance(frame, Step) and frame.session == 1
            for _, to, frame in cluster.frames
        )


async def test_answers_that_nobody_asked_for_cost_little(clock: MockClock) -> None:
    """Each is refused, but not any number at once to one that does not listen."""
    async with ServingCluster(*NAMES, "x").running() as cluster:
        plan = cluster.publish(*NAMES)
        await cluster.ready(plan)
        cluster.hub.cut("a", "x")
        before = trio.lowlevel.current_statistics().tasks_living
        for number in range(5000):
            cluster.nodes["a"].ingress.output("x", Output(request=f"r{number}", index=0))
        assert trio.lowlevel.current_statistics().tasks_living < before + 100
        assert (await ask(cluster.nodes["b"], "fine"))[0] == expected("fine", 20, 3)


async def test_requests_ride_a_retiring_pipeline_until_another_one_is_ready(
    clock: MockClock,
) -> None:
    async with ServingCluster(*NAMES).running() as cluster:
        first = cluster.publish("a", "b")
        await cluster.ready(first)
        old = first.models[0].pipelines
        cluster.nodes["c"].refuse_load = "not yet"
        plan = cluster.make_plan("c")
        [model] = plan.models
        plan = replace(plan, models=(replace(model, retiring=old),))
        generation = Generation(max_tokens=300, temperature=0)
        async with await cluster.nodes["b"].ingress.chat(None, prompt("x"), generation) as answer:
            tokens = 0
            async for delta in answer:
                if not tokens:
                    for node in cluster.nodes.values():
                        node.take(plan)
                tokens += delta.tokens
                if tokens >= 100:
                    # A new request still finds the old pipeline, for the new one is not ready.
                    assert (await ask(cluster.nodes["c"], "y"))[0] == expected("y", 20, 2)
            assert answer.recoveries == 0
        cluster.nodes["c"].refuse_load = ""
        await cluster.until(lambda: cluster.members["c"].record.stages[0].state == "ready")
        assert (await ask(cluster.nodes["a"], "z"))[0] == expected("z", 20, 1)
        # Nothing of the old one is left when the next plan drops it.
        last = replace(plan, epoch=replace(plan.epoch, version=99), models=(model,))
        for node in cluster.nodes.values():
            node.take(last)
        await cluster.until(lambda: not cluster.members["a"].record.stages)
        assert (await ask(cluster.nodes["a"], "z"))[0] == expected("z", 20, 1)


async def test_a_retiring_head_tells_how_many_requests_it_has(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        first = cluster.publish("a")
        await cluster.ready(first)
        node = cluster.nodes["a"]
        node.stages.tell_requests(node.heads.loads())
        assert cluster.members["a"].record.stages[0].requests is None
        plan = cluster.make_plan("b")
        [model] = plan.models
        retiring = first.models[0].pipelines
        node.take(replace(plan, models=(replace(model, retiring=retiring),)))
        generation = Generation(max_tokens=300, temperature=0)
        async with await node.ingress.chat(None, prompt("x"), generation):
            node.stages.tell_requests(node.heads.loads())
            assert cluster.members["a"].record.stages[0].requests == 1
        await cluster.until(lambda: not any(node.heads.loads().values()))
        node.stages.tell_requests(node.heads.loads())
        assert cluster.members["a"].record.stages[0].requests == 0


async def test_a_stopped_model_takes_no_new_requests(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        first = cluster.publish("a")
        await cluster.ready(first)
        node = cluster.nodes["a"]
        [model] = first.models
        generation = Generation(max_tokens=200, temperature=0)
        async with await node.ingress.chat(None, prompt("x"), generation) as answer:
            stopped = replace(model, state="stopped", pipelines=(), retiring=model.pipelines)
            node.take(replace(first, epoch=replace(first.epoch, version=9), models=(stopped,)))
            with pytest.raises(UnknownModel, match="was stopped"):
                await ask(node, "y")
            assert sum([delta.tokens async for delta in answer]) > 0
            assert answer.recoveries == 0
