"""How many steps a stage takes, and what becomes of them when its executor dies."""

import trio
import trio.testing

from pxd.serving.runner import MAX_UNDER_WAY
from pxd.wire import Nack, Sampled, Step, Tensor
from tests.serving.harness import ServingCluster

SESSION = 7


def make_step(pipeline: str, number: int) -> Step:
    return Step(
        pipeline=pipeline, session=SESSION, step=number, rows=(), tensor=Tensor("i32", (0,))
    )


async def feed_too_many(cluster: ServingCluster, nursery: trio.Nursery) -> list[int]:
    """Feed node a with two steps more than it takes; returns those that it has taken so far."""
    plan = cluster.publish("a")
    await cluster.ready(plan)
    [pipeline] = plan.models[0].pipelines
    node, fed = cluster.nodes["a"], []
    node.gate = trio.Event()

    async def feed() -> None:
        for number in range(MAX_UNDER_WAY + 2):
            await node.stages.feed("a", make_step(pipeline.id, number), b"")
            fed.append(number)

    nursery.start_soon(feed)
    await trio.testing.wait_all_tasks_blocked()
    return fed


def answers(cluster: ServingCluster, kind: type[Nack | Sampled]) -> list[int]:
    """Those to steps of `make_step`, not to what the head sends."""
    found = [frame for _, _, frame in cluster.frames if isinstance(frame, kind)]
    return [frame.step for frame in found if frame.session == SESSION]


async def test_steps_beyond_what_is_under_way_wait_and_keep_their_order(
    clock: trio.testing.MockClock,
) -> None:
    everything = [*range(MAX_UNDER_WAY + 2)]
    async with ServingCluster("a").running() as cluster, trio.open_nursery() as nursery:
        fed = await feed_too_many(cluster, nursery)
        assert fed == everything[:MAX_UNDER_WAY]
        cluster.nodes["a"].gate.set()
        await cluster.until(lambda: len(answers(cluster, Sampled)) == len(everything))
        assert answers(cluster, Sampled) == fed == everything


async def test_every_step_that_a_dead_executor_had_is_answered(
    clock: trio.testing.MockClock,
) -> None:
    async with ServingCluster("a").running() as cluster, trio.open_nursery() as nursery:
        fed = await feed_too_many(cluster, nursery)
        cluster.nodes["a"].executors[0].die("killed by signal 9")
        await cluster.until(lambda: len(fed) == MAX_UNDER_WAY + 2)
        await cluster.until(lambda: len(answers(cluster, Nack)) == len(fed))
        assert sorted(answers(cluster, Nack)) == fed
        assert not answers(cluster, Sampled)
