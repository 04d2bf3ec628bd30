"""Requests leave nodes that do not answer for others that do; in virtual time."""

import pytest
import trio
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.serving.answer import MAX_MOVES
from pxd.serving.dispatch import GRACE_S, SILENCE_S
from pxd.serving.requests import Generation, GenerationFailed
from pxd.wire import Output

from .harness import ServingCluster
from .test_routing import replicas
from .test_serving import expected, prompt

TOKENS = 30


class Reader:
    """Reads one answer at node c. `pace` of the executors is such that it takes three seconds."""

    def __init__(self, cluster: ServingCluster) -> None:
        self.cluster = cluster
        self.node = cluster.nodes["c"]
        self.text = ""
        self.longest = 0.0
        self.recoveries = 0
        self.done = trio.Event()
        for node in cluster.nodes.values():
            node.pace = 0.1

    async def run(self, text: str = "hello") -> None:
        generation = Generation(max_tokens=TOKENS, temperature=0)
        last = trio.current_time()
        async with await self.node.ingress.chat("sums", prompt(text), generation) as answer:
            async for delta in answer:
                now = trio.current_time()
                self.text += delta.text
                self.longest, last = max(self.longest, now - last), now
        self.recoveries = answer.recoveries
        self.done.set()

    async def read(self, tokens: int) -> None:
        await self.cluster.until(lambda: self.text.count("[") >= tokens)

    @property
    def home(self) -> str:
        """The head of the pipeline that the answer rides."""
        [attempt] = self.node.ingress._dispatch.attempts
        return attempt.head


def freeze(cluster: ServingCluster, name: str) -> None:
    cluster.nodes[name].gate = trio.Event()


def thaw(cluster: ServingCluster, name: str) -> None:
    cluster.nodes[name].gate.set()


def believe(cluster: ServingCluster, name: str, state: str) -> None:
    cluster.members[name].state = state
    cluster.follow()


async def test_an_answer_leaves_a_silent_node_when_it_is_suspected(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        home = reader.home
        freeze(cluster, home)
        await trio.sleep(2 * SILENCE_S)
        believe(cluster, home, "suspect")
        at = trio.current_time()
        await cluster.until(lambda: reader.home != home)
        assert trio.current_time() - at == pytest.approx(GRACE_S, abs=0.1)
        await reader.done.wait()
        # The arithmetic model computes what was there already at the pace of new tokens.
        assert reader.longest < 2 * SILENCE_S + GRACE_S + 0.1 * len("hello") + 10 * 0.1 + 0.2
        assert reader.text == expected("hello", TOKENS, 1)
        assert reader.recoveries == 1
        # What the node says when it goes on changes nothing.
        thaw(cluster, home)
        believe(cluster, home, "alive")
        await cluster.until(lambda: cluster.nodes[home].heads.running == 0)


async def test_a_suspect_that_answers_keeps_its_requests(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        believe(cluster, reader.home, "suspect")
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)
        assert reader.recoveries == 0


async def test_a_suspicion_that_ends_in_time_moves_nothing(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        home = reader.home
        freeze(cluster, home)
        await trio.sleep(10 * SILENCE_S)
        for _ in range(3):
            believe(cluster, home, "suspect")
            await trio.sleep(0.8 * GRACE_S)
            believe(cluster, home, "alive")
            await trio.sleep(0.1)
        thaw(cluster, home)
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)
        assert reader.recoveries == 0


@pytest.mark.parametrize("others", ["suspected", "full", "none"])
async def test_where_no_other_is_sound_it_waits(clock: MockClock, others: str) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, *("a" if others == "none" else "ab"))
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        home = reader.home
        other = "b" if home == "a" else "a"
        if others == "full":
            [report] = cluster.members[other].record.stages
            cluster.update(other, stages=(replace(report, kv_tokens=16),))
        elif others == "suspected":
            believe(cluster, other, "suspect")
        freeze(cluster, home)
        believe(cluster, home, "suspect")
        await trio.sleep(20)
        assert reader.home == home
        thaw(cluster, home)
        believe(cluster, home, "alive")
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)
        assert reader.recoveries == 0


async def test_it_is_moved_as_soon_as_there_is_a_sound_one(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        home = reader.home
        other = "b" if home == "a" else "a"
        freeze(cluster, home)
        believe(cluster, other, "suspect")
        believe(cluster, home, "suspect")
        await trio.sleep(5)
        assert reader.home == home
        believe(cluster, other, "alive")
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)
        assert reader.recoveries == 1


async def test_a_silent_tail_counts_like_a_silent_head(clock: MockClock) -> None:
    async with ServingCluster(*"abcd").running() as cluster, trio.open_nursery() as nursery:
        first, second = cluster.make_plan("a", "b"), cluster.make_plan("c", "d")
        [model] = first.models
        pipelines = (*model.pipelines, *second.models[0].pipelines)
        plan = replace(first, models=(replace(model, pipelines=pipelines),))
        for node in cluster.nodes.values():
            node.take(plan)
        await cluster.ready(plan)
        reader = Reader(cluster)
        nursery.start_soon(reader.run)
        await reader.read(5)
        home = reader.home
        tail = {"a": "b", "c": "d"}[home]
        freeze(cluster, tail)
        believe(cluster, tail, "suspect")
        await cluster.until(lambda: reader.home != home)
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 2)
        assert reader.recoveries == 1


async def test_nobody_waits_for_a_silent_head_to_take_a_request(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        call, asked = reader.node.network.call, []

        async def silent(peer: str, *arguments: object, **options: object) -> object:
            asked.append(peer)
            if len(asked) == 1:
                await trio.sleep_forever()
            return await call(peer, *arguments, **options)

        monkeypatch.setattr(reader.node.network, "call", silent)
        began = trio.current_time()
        nursery.start_soon(reader.run)
        await cluster.until(lambda: asked)
        believe(cluster, asked[0], "suspect")
        await reader.read(1)
        assert trio.current_time() - began < SILENCE_S + GRACE_S + 1
        assert set(asked) == {"a", "b"}
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)


async def test_it_does_not_go_round_and_round(clock: MockClock) -> None:
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        for name in "ab":
            freeze(cluster, name)
        nursery.start_soon(reader.run)
        await cluster.until(lambda: len(reader.node.ingress._dispatch.attempts))
        homes = [reader.home]
        for _ in range(3 * MAX_MOVES):
            believe(cluster, reader.home, "suspect")
            await trio.sleep(2 * (SILENCE_S + GRACE_S))
            for name in "ab":
                believe(cluster, name, "alive")
            homes += [reader.home] if reader.home != homes[-1] else []
        assert len(homes) == MAX_MOVES + 1
        for name in "ab":
            thaw(cluster, name)
        await reader.done.wait()
        assert reader.text == expected("hello", TOKENS, 1)


async def test_a_head_cannot_keep_a_request_going_round(clock: MockClock) -> None:
    """Only this node itself says that another one is silent."""
    async with ServingCluster("a", "b", "c").running() as cluster, trio.open_nursery() as nursery:
        await replicas(cluster, "a", "b")
        reader = Reader(cluster)
        for name in "ab":
            freeze(cluster, name)

        async def read() -> None:
            with pytest.raises(GenerationFailed, match="attempts without a token"):
                await reader.run()
            nursery.cancel_scope.cancel()

        nursery.start_soon(read)
        ingress = reader.node.ingress
        with trio.fail_after(600):
            while True:
                for attempt in list(ingress._dispatch.attempts):
                    claim = Output(request=attempt.name, index=0, failure="silence: not me")
                    ingress.output(attempt.head, claim)
                await trio.sleep(0.1)
