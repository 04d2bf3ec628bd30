"""Which pipeline a request rides."""

from typing import NamedTuple

from pxd.cluster.plans import ModelPlan, PipelinePlan, StagePlan
from pxd.cluster.records import NodeRecord, StageReport
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


def members(*, running: dict[str, int], **states: str) -> dict[str, FakeMember]:
    def record(node: str) -> NodeRecord:
        stage = StageReport(model="m", pipeline=f"on-{node}", start=0, end=4, state="ready")
        return NodeRecord(id=node, name=node, running=running.get(node, 0), stages=(stage,))

    return {node: FakeMember(record(node), states.get(node, "alive")) for node in NODES}


def test_the_least_loaded_replica_is_taken_and_of_equals_the_first() -> None:
    assert pick_pipeline(MODEL, members(running={})).head == "a"
    assert pick_pipeline(MODEL, members(running={"a": 2, "b": 1, "c": 3})).head == "b"


def test_a_replica_that_failed_the_request_comes_last() -> None:
    busy = members(running={"b": 5, "c": 6})
    assert pick_pipeline(MODEL, busy, {"on-a": 1}).head == "b"
    assert pick_pipeline(MODEL, busy, {"on-a": 1, "on-b": 1}).head == "c"
    assert pick_pipeline(MODEL, busy, {"on-a": 1, "on-b": 1, "on-c": 1}).head == "a"


def test_a_replica_that_does_not_answer_is_taken_only_if_there_is_no_other() -> None:
    assert pick_pipeline(MODEL, members(running={"b": 5, "c": 9}, a="suspect")).head == "b"
    silent = members(running={}, a="suspect", b="dead", c="left")
    assert pick_pipeline(MODEL, silent).head == "a"
