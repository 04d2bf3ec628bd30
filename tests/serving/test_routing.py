"""Requests among replicas, and whose fault it is when they fail; in virtual time."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.cluster.plans import Plan
from pxd.executors.protocol import ExecutorDied, LoadSpec, StageInfo
from pxd.planning.routing.breaker import FAILURES_TO_OPEN, PAUSES_S
from pxd.planning.routing.rendezvous import rendezvous
from pxd.serving import head as head_module
from pxd.serving.requests import Generation, GenerationFailed, Overloaded
from pxd.wire import Buffer, Nack, Output, Step

from .harness import ArithmeticExecutor, ServingCluster, ServingNode
from .test_serving import ask, expected, prompt

POISON = "@"


async def replicas(cluster: ServingCluster, *names: str) -> Plan:
    """A plan in which each of these nodes serves alone."""
    pipelines = tuple(cluster.make_plan(name).models[0].pipelines[0] for name in names)
    plan = cluster.make_plan(names[0])
    plan = replace(plan, models=(replace(plan.models[0], pipelines=pipelines),))
    for node in cluster.nodes.values():
        node.take(plan)
    await cluster.ready(plan)
    return plan


def steps(cluster: ServingCluster, names: str) -> list[int]:
    return [sum(each.steps for each in cluster.nodes[name].executors) for name in names]


async def settled(cluster: ServingCluster, names: str) -> None:
    """Every stage has heard that the requests before have ended."""
    await cluster.until(
        lambda: not any(each.caches for name in names for each in cluster.nodes[name].executors)
    )


async def chat(node: ServingNode, text: str, session: str = "") -> str:
    generation = Generation(max_tokens=20, temperature=0)
    messages = prompt(text)
    async with await node.ingress.chat("sums", messages, generation, "", session) as answer:
        return "".join([delta.text async for delta in answer])


async def test_a_session_stays_on_one_replica_at_whatever_node_it_comes_in(
    clock: MockClock,
) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster:
        plan = await replicas(cluster, "a", "b")
        homes = {pipeline.id: pipeline.head for pipeline in plan.models[0].pipelines}
        for session in ("one", "two", "three", "four"):
            home = homes[rendezvous(session, homes)]
            before = dict(zip("ab", steps(cluster, "ab"), strict=True))
            for name in ("a", "b", "c"):
                assert await chat(cluster.nodes[name], name, session) == expected(name, 20, 1)
            await settled(cluster, "ab")
            after = dict(zip("ab", steps(cluster, "ab"), strict=True))
            assert [name for name in "ab" if after[name] > before[name]] == [home]


class Caching(ArithmeticExecutor):
    """One whose pipeline tells that requests may begin with what others have left."""

    async def load(self, spec: LoadSpec, progress: object) -> StageInfo:
        return replace(await super().load(spec, progress), prefix_cache=True)


async def test_a_conversation_goes_on_where_it_began(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The arithmetic model keeps no blocks, so the heads are told that it does not: only the
    ingress believes that there are caches."""
    config = head_module.ContinuousConfig
    monkeypatch.setattr(
        head_module,
        "ContinuousConfig",
        lambda **options: config(**{**options, "prefix_cache": False}),
    )
    async with ServingCluster("a", "b", "c").running() as cluster:
        for node in cluster.nodes.values():
            node.executor_type = Caching
        await replicas(cluster, "a", "b")
        node = cluster.nodes["c"]
        homes = []
        for talk in ("x", "y", "z", "w"):
            text = talk * 80
            for _ in range(3):
                before = steps(cluster, "ab")
                assert await chat(node, text) == expected(text, 20, 1)
                await settled(cluster, "ab")
                after = steps(cluster, "ab")
                homes.append([now > then for now, then in zip(after, before, strict=True)])
                text += "next" * 20
        for number in range(0, len(homes), 3):
            assert homes[number] == homes[number + 1] == homes[number + 2]
            assert sum(homes[number]) == 1


async def test_short_requests_are_shared_out_evenly(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster:
        await replicas(cluster, "a", "b", "c")
        for number in range(9):
            await ask(cluster.nodes["a"], f"q{number}")
            await settled(cluster, "abc")
        assert len(set(steps(cluster, "abc"))) == 1


async def test_where_one_has_no_room_another_is_tried_before_anybody_waits(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "MAX_REQUESTS", 4)
    async with ServingCluster("a", "b", "c").running() as cluster:
        plan = await replicas(cluster, "a", "b")
        homes = {pipeline.id: pipeline.head for pipeline in plan.models[0].pipelines}
        home = homes.pop(rendezvous("s", homes))
        [other] = homes.values()
        for node in cluster.nodes.values():
            node.gate = trio.Event()
        node = cluster.nodes["c"]

        def held(name: str) -> int:
            return cluster.nodes[name].heads.loads().popitem()[1]

        async with trio.open_nursery() as nursery:
            for number in range(2):
                nursery.start_soon(chat, node, f"{number}", "s")
            await cluster.until(lambda: held(home) == 2)
            for count in (1, 2):
                began = trio.current_time()
                nursery.start_soon(chat, node, f"more {count}", "s")
                await cluster.until(lambda count=count: held(other) == count)
                assert trio.current_time() - began < 0.05, "nobody waits for a retry"
            began = trio.current_time()
            with pytest.raises(Overloaded):
                await chat(node, "one too many", "s")
            assert trio.current_time() == began
            for each in cluster.nodes.values():
                each.gate.set()


async def test_a_replica_that_always_fails_is_left_alone_for_a_while(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster:
        await replicas(cluster, "a", "b")
        tries: list[float] = []

        async def fail(step: Step, body: Buffer) -> Nack:
            if step.rows:
                tries.append(trio.current_time())
            return Nack(
                pipeline=step.pipeline,
                session=step.session,
                step=step.step,
                code="executor-failed",
                reason="no memory",
            )

        executor = cluster.nodes["b"].executors[0]
        good, executor.step = executor.step, fail
        for number in range(20):
            text = f"question {number}"
            assert await chat(cluster.nodes["c"], text) == expected(text, 20, 1)
        assert len(tries) == FAILURES_TO_OPEN
        executor.step = good
        await trio.sleep(PAUSES_S[0])
        before = steps(cluster, "b")
        for number in range(4):
            text = f"later {number}"
            assert await chat(cluster.nodes["c"], text) == expected(text, 20, 1)
        assert steps(cluster, "b")[0] >= before[0] + 40


async def test_tokens_that_come_twice_or_late_are_dropped(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster:
        await cluster.ready(cluster.publish("a", "b"))
        node = cluster.nodes["c"]
        take, seen = node.ingress.output, []

        def again_and_again(peer: str, frame: Output) -> None:
            """Every frame twice, and after it all earlier ones, of lost attempts too."""
            seen.append((peer, frame))
            take(peer, frame)
            for earlier in seen:
                take(*earlier)

        node.ingress.output = again_and_again  # type: ignore[method-assign]
        generation = Generation(max_tokens=30, temperature=0)
        async with await node.ingress.chat(None, prompt("echo"), generation) as answer:
            text, tokens = "", 0
            async for delta in answer:
                text += delta.text
                tokens += delta.tokens
                if tokens == 5:
                    cluster.nodes["b"].executors[-1].die("killed by signal 9")
        assert (text, tokens) == (expected("echo", 30, 2), 30)
        assert answer.recoveries == 1
        assert len({frame.request for _, frame in seen}) == 2


async def test_more_tokens_than_were_asked_for_are_dropped(clock: MockClock) -> None:
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["b"]
        take = node.ingress.output

        def more(peer: str, frame: Output) -> None:
            tokens = frame.tokens + (7,) * 100 if frame.finish else frame.tokens
            take(peer, replace(frame, tokens=tokens))

        node.ingress.output = more  # type: ignore[method-assign]
        assert await ask(node, "much") == (expected("much", 20, 1), "length")


class DelayedRecords:
    """Records of stages that arrive later than anything else does."""

    def __init__(self, cluster: ServingCluster, delay: float) -> None:
        self.cluster, self.delay = cluster, delay
        self.update = cluster.update
        self.send, self.receive = trio.open_memory_channel[tuple[float, str, dict[str, object]]](99)
        cluster.update = self.take  # type: ignore[method-assign]

    def take(self, name: str, **changes: object) -> None:
        self.send.send_nowait((trio.current_time() + self.delay, name, changes))

    async def run(self) -> None:
        async for due, name, changes in self.receive:
            await trio.sleep_until(due)
            self.update(name, **changes)

    async def look_again(self) -> None:
        """Other records come all the time."""
        while True:
            await trio.sleep(0.02)
            self.cluster.follow()


async def test_one_death_of_an_executor_counts_once(clock: MockClock) -> None:
    """Its record comes after its NACK: meanwhile the head begins again and fails again."""
    async with ServingCluster("a", "b").running() as cluster, trio.open_nursery() as nursery:
        await cluster.ready(cluster.publish("a"))
        records = DelayedRecords(cluster, 0.5)
        nursery.start_soon(records.run)
        nursery.start_soon(records.look_again)
        victim, node = cluster.nodes["a"], cluster.nodes["b"]
        victim.gate = trio.Event()

        async def strike() -> None:
            await cluster.until(lambda: victim.heads.running == 1)
            victim.executors[0].die("killed by signal 9")
            await trio.sleep(0.7)
            victim.gate.set()

        nursery.start_soon(strike)
        generation = Generation(max_tokens=20, temperature=0)
        async with await node.ingress.chat(None, prompt("once"), generation) as answer:
            assert "".join([delta.text async for delta in answer]) == expected("once", 20, 1)
        failures = [
            frame.failure or "" for *_, frame in cluster.frames if isinstance(frame, Output)
        ]
        assert sum(failure.startswith("executor-died") for failure in failures) == 2
        assert len(victim.executors) == 2
        nursery.cancel_scope.cancel()


class Fragile(ArithmeticExecutor):
    """Dies over every prompt that begins with `POISON`."""

    async def step(self, step: Step, body: Buffer):
        await trio.sleep(0.01)
        first = memoryview(bytes(body)).cast("i")
        offset = 0
        for row in step.rows:
            if row.position == 0 and first[offset] == ord(POISON):
                self.die("segmentation fault")
                raise ExecutorDied("segmentation fault")
            offset += row.count
        return await super().step(step, body)


async def test_a_poisonous_request_takes_nobody_with_it(clock: MockClock) -> None:
    """It is stopped after two executors, and whoever was beside it goes on, from wherever."""
    async with ServingCluster("a", "b", "c").running() as cluster:
        for node in cluster.nodes.values():
            node.executor_type = Fragile
        await cluster.ready(cluster.publish("a"))
        texts: dict[str, str] = {}

        async def innocent(name: str, text: str) -> None:
            texts[text] = (await ask(cluster.nodes[name], text, 60))[0]

        async def poisonous() -> None:
            with pytest.raises(GenerationFailed, match=r"2 executor deaths.*segmentation"):
                await ask(cluster.nodes["b"], POISON, 60)

        victim = cluster.nodes["a"]
        async with trio.open_nursery() as nursery:
            for number in range(6):
                nursery.start_soon(innocent, "abc"[number % 3], f"early {number}")
            await cluster.until(lambda: victim.executors[0].steps >= 5)
            # These have no token yet when the first executor dies.
            victim.gate = trio.Event()
            for number in range(6):
                nursery.start_soon(innocent, "abc"[number % 3], f"late {number}")
            nursery.start_soon(poisonous)
            await cluster.until(lambda: victim.heads.loads().popitem()[1] == 13)
            victim.gate.set()
        assert texts == {text: expected(text, 60, 1) for text in texts}
        assert len(texts) == 12
        assert len(victim.executors) == 3
        assert (await ask(cluster.nodes["c"], "after"))[0] == expected("after", 20, 1)
        assert not any(len(node.ingress._dispatch.attempts) for node in cluster.nodes.values())
