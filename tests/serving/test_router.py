"""Which pipeline a request rides, from what the nodes' records say."""

from typing import NamedTuple

import pytest
from msgspec.structs import replace

from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport
from pxd.planning.routing.router import Router, Wish
from pxd.serving.requests import NotReady
from pxd.serving.router import pick_pipeline

NODES = ("a", "b", "c")
MODEL = ModelPlan(
    name="m",
    layers=4,
    pipelines=tuple(PipelinePlan(f"on-{node}", (StagePlan(node, 0, 4),)) for node in NODES),
)


class FakeMember(NamedTuple):
    record: NodeRecord
    state: str


def members(
    *,
    running: dict[str, int] | None = None,
    kv_tier: dict[str, int] | None = None,
    kv_tokens: dict[str, int] | None = None,
    **states: str,
) -> dict[str, FakeMember]:
    def record(node: str) -> NodeRecord:
        stage = StageReport(
            model="m",
            pipeline=f"on-{node}",
            start=0,
            end=4,
            state="ready",
            kv_tokens=(kv_tokens or {}).get(node, 1024),
        )
        return NodeRecord(
            id=node,
            name=node,
            running=(running or {}).get(node, 0),
            kv_tier=(kv_tier or {}).get(node, 0),
            stages=(stage,),
        )

    return {node: FakeMember(record(node), states.get(node, "alive")) for node in NODES}


def pick(
    seen: dict[str, FakeMember],
    *,
    model: ModelPlan = MODEL,
    tokens: int = 10,
    failures: dict[str, int] | None = None,
    router: Router | None = None,
) -> str:
    wish = Wish(failures=failures or {})
    return pick_pipeline(router or Router(), model, seen, wish, tokens=tokens, now=0.0).head


def test_the_least_loaded_replica_is_taken_and_of_equals_who_served_least() -> None:
    assert pick(members(running={"a": 2, "b": 1, "c": 3})) == "b"
    router = Router()
    chosen = []
    for _ in range(6):
        chosen.append(pick(members(), router=router))
        router.ended(f"on-{chosen[-1]}")
    assert chosen == list("abcabc")


def test_what_was_sent_since_the_last_word_counts_too() -> None:
    router = Router()
    seen = members(running={"a": 3, "b": 1, "c": 3})
    assert [pick(seen, router=router) for _ in range(2)] == ["b", "b"]
    assert sorted(pick(seen, router=router) for _ in range(3)) == ["a", "b", "c"]
    # The next word of the heads has these requests in it.
    seen = members(running={"a": 4, "b": 3, "c": 4})
    assert pick(seen, router=router) == "b"


def test_a_replica_short_of_kv_blocks_comes_after_a_busier_one() -> None:
    assert pick(members(running={"a": 0, "b": 3, "c": 2}, kv_tier={"a": 1})) == "c"


def test_a_replica_too_small_for_the_request_comes_last() -> None:
    small = members(running={"b": 5, "c": 6}, kv_tokens={"a": 128})
    assert pick(small, tokens=128) == "a"
    assert pick(small, tokens=129) == "b"


def test_a_replica_that_failed_the_request_comes_last() -> None:
    busy = members(running={"b": 5, "c": 6})
    assert pick(busy, failures={"on-a": 1}) == "b"
    assert pick(busy, failures={"on-a": 1, "on-b": 1}) == "c"
    assert pick(busy, failures={"on-a": 1, "on-b": 1, "on-c": 1}) == "a"


def test_a_replica_that_does_not_answer_is_taken_only_if_there_is_no_other() -> None:
    assert pick(members(running={"b": 5, "c": 9}, a="suspect")) == "b"
    assert pick(members(a="suspect", b="dead", c="left")) == "a"


def test_a_retiring_pipeline_is_taken_only_if_there_is_no_other() -> None:
    first, *others = MODEL.pipelines
    model = replace(MODEL, pipelines=tuple(others), retiring=(first,))
    assert pick(members(running={"b": 5, "c": 9}), model=model) == "b"
    assert pick(members(b="dead", c="dead"), model=model) == "a"


def test_without_a_ready_pipeline_every_reason_is_told() -> None:
    with pytest.raises(NotReady, match=r"a is dead \| b is left \| c is dead"):
        pick(members(a="dead", b="left", c="dead"))
    with pytest.raises(NotReady, match="no memory") as caught:
        pick(members(), model=ModelPlan(name="m", state="waiting", reason="no memory"))
    assert caught.value.retry_after == 10
