"""More requests than there is room for: none is lost, none hangs, and what is held is bounded."""

import json
from collections import Counter

import httpx
import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from msgspec.structs import replace
from trio.testing import MockClock

from pxd.api.app import create_app
from pxd.serving import attempts as attempts_module
from pxd.serving import head as head_module
from pxd.serving.head import MAX_REQUESTS
from pxd.serving.quota import Quota
from pxd.serving.requests import Generation, GenerationFailed, Overloaded
from tests.api.fakes import FakeDaemon

from .harness import ServingCluster, ServingNode
from .test_serving import ask, expected, prompt

REQUESTS = 10_000


def http_client(node: ServingNode) -> httpx.AsyncClient:
    daemon = FakeDaemon()
    daemon.ingress = node.ingress  # type: ignore[assignment]
    transport = httpx.ASGITransport(create_app(daemon))
    return httpx.AsyncClient(transport=transport, base_url="http://node", timeout=None)


def text_of(events: str) -> str:
    *chunks, done = events.removesuffix("\n\n").split("\n\n")
    assert done == "data: [DONE]"
    choices = [json.loads(chunk.removeprefix("data: "))["choices"][0] for chunk in chunks]
    assert choices[-1]["finish_reason"] in ("stop", "length")
    return "".join(choice["delta"].get("content", "") for choice in choices)


@pytest.mark.slow
async def test_ten_thousand_requests_at_once(clock: MockClock) -> None:
    """From the JSON body to the last event. One node may fill half of what a head can hold."""
    async with ServingCluster("a", "b").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        node, head = cluster.nodes["a"], cluster.nodes["b"].heads
        cluster.nodes["b"].gate = trio.Event()
        statuses: Counter[int] = Counter()

        async def one(http: httpx.AsyncClient, number: int) -> None:
            body = {
                "messages": [{"role": "user", "content": f"q{number}"}],
                "temperature": 0,
                "max_tokens": 2,
                "stream": True,
            }
            response = await http.post("/v1/chat/completions", json=body)
            statuses[response.status_code] += 1
            if response.status_code == 200:
                assert text_of(response.text) == expected(f"q{number}", 2, 1)
                return
            assert response.status_code == 429
            assert int(response.headers["retry-after"]) > 0
            assert response.json()["error"]["code"] == "overloaded"

        async with http_client(node) as http, trio.open_nursery() as nursery:
            for number in range(REQUESTS):
                nursery.start_soon(one, http, number)
            await cluster.until(lambda: statuses[429] + head.running + head.waiting == REQUESTS)
            assert head.running + head.waiting == MAX_REQUESTS // 2
            assert len(node.ingress._dispatch.attempts) == MAX_REQUESTS // 2
            cluster.nodes["b"].gate.set()
        assert statuses == {200: MAX_REQUESTS // 2, 429: REQUESTS - MAX_REQUESTS // 2}
        assert head.running + head.waiting == 0
        assert not len(node.ingress._dispatch.attempts)


async def test_one_node_cannot_shut_out_another(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither by the number of its requests nor by calling them urgent."""
    monkeypatch.setattr(head_module, "MAX_REQUESTS", 2000)
    async with ServingCluster("a", "b", "c").running() as cluster:
        await cluster.ready(cluster.publish("b"))
        head = cluster.nodes["b"]
        head.gate = trio.Event()
        refused = 0

        async def flood(number: int) -> None:
            nonlocal refused
            try:
                await ask(cluster.nodes["a"], f"flood {number}", 20, priority=-10)
            except Overloaded:
                refused += 1

        async def single() -> None:
            text, _ = await ask(cluster.nodes["c"], "single", 20, priority=10)
            assert text == expected("single", 20, 1)
            assert head.heads.waiting > 500
            nursery.cancel_scope.cancel()

        async with trio.open_nursery() as nursery:
            for number in range(1050):
                nursery.start_soon(flood, number)
            await cluster.until(lambda: refused == 50)
            nursery.start_soon(single)
            await cluster.until(lambda: head.heads.waiting + head.heads.running > 1000)
            head.gate.set()
            await trio.sleep_forever()
        assert nursery.cancel_scope.cancelled_caught


async def test_prompts_are_bounded_together(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "MAX_TOKENS", 1000)
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        node.gate = trio.Event()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(ask, node, "x" * 400)
            await cluster.until(lambda: node.heads.running == 1)
            with pytest.raises(Overloaded, match="too long"):
                await ask(node, "y" * 400)
            nursery.start_soon(ask, node, "z" * 50)
            await cluster.until(lambda: node.heads.running + node.heads.waiting == 2)
            node.gate.set()
        assert (await ask(node, "y" * 400))[0] == expected("y" * 400, 20, 1)


async def test_another_pipeline_takes_what_one_has_no_room_for(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(head_module, "MAX_REQUESTS", 4)
    async with ServingCluster("a", "b", "c").running() as cluster:
        plans = [cluster.make_plan(name).models[0].pipelines[0] for name in ("a", "b")]
        plan = cluster.make_plan("a")
        model = plan.models[0]
        plan = replace(plan, models=(replace(model, pipelines=tuple(plans)),))
        for node in cluster.nodes.values():
            node.take(plan)
        await cluster.ready(plan)
        for node in cluster.nodes.values():
            node.gate = trio.Event()
        node = cluster.nodes["c"]
        async with trio.open_nursery() as nursery:
            for number in range(4):
                nursery.start_soon(ask, node, f"{number}")
            await cluster.until(
                lambda: [cluster.nodes[name].heads.running for name in "ab"] == [2, 2]
            )
            with pytest.raises(Overloaded):
                await ask(node, "one too many")
            for other in cluster.nodes.values():
                other.gate.set()


@given(
    st.integers(2, 1000),
    st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 400), st.booleans()), max_size=60),
)
def test_a_quota_is_never_exceeded_and_nobody_takes_all(
    limit: int, events: list[tuple[str, int, bool]]
) -> None:
    quota = Quota(limit)
    held: dict[str, list[int]] = {"a": [], "b": [], "c": []}
    for holder, amount, back in events:
        if back and held[holder]:
            quota.give_back(holder, held[holder].pop())
            continue
        total = sum(map(sum, held.values()))
        fits = quota.take(holder, amount)
        assert fits == (sum(held[holder]) + amount <= limit - total - amount)
        if fits:
            held[holder].append(amount)
            assert sum(held[holder]) <= limit / 2


async def test_who_does_not_read_is_given_up_before_others_are_short_of_memory(
    clock: MockClock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attempts_module, "MAX_UNREAD", 40_000)
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        generation = Generation(max_tokens=400, temperature=0, min_tokens=400)
        async with await node.ingress.chat("sums", prompt("slow"), generation) as slow:
            await cluster.until(lambda: slow._attempt.lost)
            assert (await ask(node, "quick", 100))[0] == expected("quick", 100, 1)
            with pytest.raises(GenerationFailed, match="takes its answer too slowly"):
                async for _ in slow:
                    pass
        await cluster.until(lambda: node.heads.running == 0)
        assert not len(node.ingress._dispatch.attempts)
        assert node.ingress._dispatch.attempts._unread._held == {}


async def test_who_reads_late_gets_all_as_long_as_there_is_room(clock: MockClock) -> None:
    async with ServingCluster("a").running() as cluster:
        await cluster.ready(cluster.publish("a"))
        node = cluster.nodes["a"]
        generation = Generation(max_tokens=100, temperature=0)
        async with await node.ingress.chat("sums", prompt("late"), generation) as late:
            await cluster.until(lambda: node.heads.running == 0)
            text = "".join([delta.text async for delta in late])
        assert text == expected("late", 100, 1)
        assert node.ingress._dispatch.attempts._unread._held == {}
