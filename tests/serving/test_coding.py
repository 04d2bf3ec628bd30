"""How stages send hidden states on: as the node's setting says, or as its links need it."""

import itertools
from typing import Any

import msgspec
import pytest
import trio
from trio.testing import MockClock

from pxd.cluster.records import NodeRecord, PeerLink
from pxd.serving.coding import choose_coding
from pxd.serving.report import LoadReport
from pxd.serving.view import node_views
from pxd.settings import WireDtype
from pxd.wire import Coding

from .harness import ServingCluster
from .test_serving import NAMES, ask, expected

TEXT = "x" * 201
FAST, SLOW = 1.0, 1e-9
"""GB/s. The harness's stages send 4 bytes for a position, for which they compute 10 ms."""


@pytest.mark.parametrize("setting", ["native", "fp8", "int8"])
def test_what_is_set_does_not_depend_on_links(setting: WireDtype) -> None:
    wanted = None if setting == "native" else setting
    for before, bandwidth, position_s in itertools.product(
        (None, "fp8", "int8"), (0.0, 1e-6, 100.0), (0.0, 1e-6, 1.0)
    ):
        chosen = choose_coding(
            setting, before, hidden_bytes=8192, bandwidth=bandwidth, position_s=position_s
        )
        assert chosen == wanted


@pytest.mark.parametrize(
    ("bandwidth", "position_s", "before", "wanted"),
    [
        # 8,192 bytes take 1 ms at 8.192 MB/s.
        (0.008192, 0.0011, None, None),
        (0.008192, 0.0009, None, "fp8"),
        (0.008192, 0.0011, "fp8", "fp8"),
        (0.008192, 0.0019, "fp8", "fp8"),
        (0.008192, 0.0021, "fp8", None),
        # Gigabit Ethernet beside a GPU that reads 5,000 tokens a second, and a laptop's uplink.
        (0.117, 1 / 5000, None, None),
        (0.005, 1 / 5000, None, "fp8"),
        # A CPU with 50 tokens a second keeps nothing waiting even there.
        (0.005, 1 / 50, None, None),
        (0.0, 0.001, None, None),
        (0.0, 0.001, "fp8", None),
        (0.000001, 0.0, None, None),
    ],
)
def test_auto_is_fp8_where_the_link_is_slower_than_the_computing(
    bandwidth: float, position_s: float, before: Coding | None, wanted: Coding | None
) -> None:
    chosen = choose_coding(
        "auto", before, hidden_bytes=8192, bandwidth=bandwidth, position_s=position_s
    )
    assert chosen == wanted


def sending_as(setting: WireDtype, *names: str) -> ServingCluster:
    cluster = ServingCluster(*NAMES)
    for name in names:
        cluster.nodes[name].stages.send_as(setting)
        cluster.nodes[name].pace = 0.01
    return cluster


def codings(cluster: ServingCluster) -> dict[str, str]:
    """As `pxd status --json` tells them."""
    views = node_views(
        {name: _Member(member.record) for name, member in cluster.members.items()},  # type: ignore[misc]
        0.0,
        own_id="a",
        routes={},
        bandwidths={},
        refused="",
    )
    return {view.name: view.stages[0].wire_dtype for view in views if view.stages}


class _Records:
    def __init__(self) -> None:
        self.record = NodeRecord(id="a", name="a")

    def update(self, **changes: Any) -> None:
        self.record = msgspec.structs.replace(self.record, **changes)


class _Survey:
    def rtts(self) -> dict[str, float]:
        return {"b": 0.02}

    def bandwidths(self) -> dict[str, float]:
        return {"b": SLOW}


class _Member:
    state, since, rtt = "alive", 0.0, None

    def __init__(self, record: object) -> None:
        self.record = record


async def answered(cluster: ServingCluster, stages: int) -> None:
    assert (await ask(cluster.nodes["a"], TEXT, 4))[0] == expected(TEXT, 4, stages)


@pytest.mark.parametrize("setting", ["fp8", "int8"])
async def test_a_node_chooses_for_what_it_sends_itself(
    clock: MockClock, setting: WireDtype
) -> None:
    async with sending_as(setting, "b", "c").running() as cluster:
        await cluster.ready(cluster.publish("a", "b", "c"))
        await answered(cluster, 3)
        assert codings(cluster) == {"a": "native", "b": setting, "c": "native"}
        assert set(cluster.nodes["a"].executors[0].sent_as) == {None}
        assert set(cluster.nodes["b"].executors[0].sent_as) == {setting}
        # Another one may be the last now, or no more.
        await cluster.ready(cluster.publish("a", "c", "b"))
        await answered(cluster, 3)
        assert codings(cluster) == {"a": "native", "b": "native", "c": setting}
        assert set(cluster.nodes["c"].executors[-1].sent_as) == {setting}


async def test_a_new_executor_is_told_as_well(clock: MockClock) -> None:
    async with sending_as("fp8", "a").running() as cluster:
        plan = cluster.publish("a", "b")
        await cluster.ready(plan)
        await answered(cluster, 2)
        cluster.nodes["a"].executors[0].die("killed by signal 9")
        await cluster.until(lambda: len(cluster.nodes["a"].executors) == 2)
        await cluster.ready(plan)
        await answered(cluster, 2)
        assert set(cluster.nodes["a"].executors[1].sent_as) == {"fp8"}


async def test_auto_follows_what_is_measured(clock: MockClock) -> None:
    async with sending_as("auto", "a").running() as cluster:
        stages = cluster.nodes["a"].stages
        await cluster.ready(cluster.publish("a", "b"))

        async def sent_with(links: list[PeerLink]) -> set[Coding | None]:
            [executor] = cluster.nodes["a"].executors
            executor.sent_as.clear()
            stages.follow_links(links)
            await answered(cluster, 2)
            return set(executor.sent_as)

        slow, fast = PeerLink("b", 0.02, SLOW), PeerLink("b", 0.02, FAST)
        for _ in range(3):
            assert await sent_with([]) == {None}, "while nothing is known"
        assert await sent_with([PeerLink("c", 0.02, SLOW), fast]) == {None}
        assert await sent_with([slow]) == {"fp8"}
        assert codings(cluster)["a"] == "fp8"
        assert await sent_with([fast]) == {None}
        assert codings(cluster)["a"] == "native"
        assert await sent_with([slow]) == {"fp8"}
        # The way to another node is another way.
        await cluster.ready(cluster.publish("a", "c"))
        assert codings(cluster)["a"] == "native"
        assert await sent_with([slow]) == {None}


async def test_stages_hear_of_the_links_in_the_record(clock: MockClock) -> None:
    async with sending_as("auto", "a").running() as cluster, trio.open_nursery() as nursery:
        node = cluster.nodes["a"]
        await cluster.ready(cluster.publish("a", "b"))
        for _ in range(3):
            await answered(cluster, 2)
        partners = frozenset({"b"})
        report = LoadReport(_Records(), node.heads, node.stages, _Survey(), lambda: partners)  # type: ignore[arg-type]
        nursery.start_soon(report.run)
        await cluster.until(lambda: codings(cluster)["a"] == "fp8")
        nursery.cancel_scope.cancel()
