import math
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.planning.routing.chains import disjoint_chains
from pxd.planning.routing.cost import NodeLoad
from pxd.planning.routing.registry import EpochPipelines, PipelineRoom, StaleEpoch
from pxd.planning.routing.shortest import NO_PATH, Path
from tests.planning.routing_cases import (
    MANAGEMENT,
    case,
    no_rtt,
    ranges,
    vector_cost,
    vector_hosts,
)

AB, CD, EF = (Path((pair[0], pair[1]), 1.0) for pair in ("ab", "cd", "ef"))


def idle(nodes: str) -> dict[str, NodeLoad]:
    return {node: NodeLoad(0, 16) for node in nodes}


def test_two_pipelines_alternate() -> None:
    vector = case("round_robin", "rr_cycle_two_pipelines")
    hosts = vector_hosts(vector["nodes"])
    chains = disjoint_chains(hosts, vector["num_layers"], vector_cost(vector["nodes"]))
    turns = EpochPipelines(1, chains)
    handed_out = [turns.next(1, idle("abcd")) for _ in range(4)]
    assert [path.nodes for path in handed_out] == [("a", "b"), ("c", "d")] * 2
    rtt = 0.144350288
    assert handed_out[0].latency == pytest.approx(0.0021958656 + rtt + 0.0021958656)
    assert handed_out[1].latency == pytest.approx(0.003161088 + rtt + 0.0017132544)


def test_overloaded_pipelines_are_skipped() -> None:
    vector = case("round_robin", "rr_skips_overloaded")
    hosts = ranges(vector["ranges"])
    turns = EpochPipelines(1, disjoint_chains(hosts, vector["num_layers"], no_rtt(hosts)))
    loads = {host.node: NodeLoad(0, 16) for host in hosts}
    loads["p1b"] = NodeLoad(16, 16)
    assert [turns.next(1, loads).nodes for _ in range(3)] == [("p2a", "p2b")] * 3
    loads["p2a"] = NodeLoad(16, 16)
    assert turns.next(1, loads) == NO_PATH == ((), math.inf)


def test_pipelines_with_dead_nodes_are_skipped_and_come_back_with_them() -> None:
    turns = EpochPipelines(1, [AB, CD])
    loads = idle("abcd") | {"b": NodeLoad(0, 16, alive=False)}
    assert [turns.next(1, loads) for _ in range(2)] == [CD, CD]
    del loads["c"]
    assert turns.next(1, loads) == NO_PATH
    assert [turns.next(1, idle("abcd")) for _ in range(2)] == [AB, CD]


def test_another_epoch_is_refused() -> None:
    turns = EpochPipelines("term 1", [AB])
    with pytest.raises(StaleEpoch, match="of epoch term 1, not of term 2"):
        turns.next("term 2", idle("ab"))
    assert turns.next("term 1", idle("ab")) == AB


def test_pipelines_that_share_a_node_are_refused() -> None:
    with pytest.raises(ValueError, match="share a node"):
        EpochPipelines(1, [AB, Path(("b", "c"), 1.0)])


def test_pipeline_capacity() -> None:
    vector = MANAGEMENT["pipeline_capacity"]
    limit, requests = vector["max_requests"], vector["current_requests"]
    turns = EpochPipelines(1, [Path(tuple(nodes), 1.0) for nodes in vector["pipelines"]])

    def rooms(*dead: str) -> tuple[PipelineRoom, ...]:
        return turns.rooms(
            {node: NodeLoad(n, limit, alive=node not in dead) for node, n in requests.items()}
        )

    def check(found: tuple[PipelineRoom, ...], expected: dict[str, object]) -> None:
        assert [[room.capacity, room.free] for room in found] == [expected["0"], expected["1"]]

    expected = vector["expected"]
    check(rooms(), expected["per_pipeline(min_capacity,min_remaining)"])
    assert sum(room.capacity for room in rooms()) == expected["total"]
    assert sum(room.free for room in rooms()) == expected["current"]
    ready = expected["with a,d inactive and ready_only"]
    check(rooms("a", "d"), ready)
    assert sum(room.capacity for room in rooms("a", "d")) == ready["total"]
    assert sum(room.free for room in rooms("a", "d")) == ready["current"]


def test_a_node_that_leaves_takes_its_pipeline_with_it_and_frees_the_others() -> None:
    vector = MANAGEMENT["remove_detaches_pipeline"]
    turns = EpochPipelines(1, [Path(tuple(vector["pipeline"]), 1.0)])
    assert turns.remove("a") == ("b",)
    assert turns.pipelines == ()
    assert turns.next(1, idle("ab")) == NO_PATH
    assert turns.remove("a") == ()


@pytest.mark.parametrize(
    ("asked", "leaves", "then"),
    [
        (1, "a", [CD, EF, CD]),
        (1, "c", [EF, AB, EF]),
        (2, "a", [EF, CD, EF]),
        (3, "f", [AB, CD, AB]),
    ],
)
def test_the_turn_goes_on_where_it_was_when_a_pipeline_is_gone(
    asked: int, leaves: str, then: list[Path]
) -> None:
    turns = EpochPipelines(1, [AB, CD, EF])
    for _ in range(asked):
        turns.next(1, idle("abcdef"))
    turns.remove(leaves)
    assert [turns.next(1, idle("abcdef")) for _ in range(3)] == then


@given(st.integers(1, 6), st.sets(st.integers(0, 5)), st.integers(0, 5), st.integers(1, 40))
def test_those_that_can_take_requests_get_equally_many(
    count: int, full: set[int], before: int, asked: int
) -> None:
    paths = [Path((f"n{i}",), 1.0) for i in range(count)]
    turns = EpochPipelines(1, paths)
    everybody = {f"n{i}": NodeLoad(0, 1) for i in range(count)}
    for _ in range(before):
        turns.next(1, everybody)
    loads = {f"n{i}": NodeLoad(int(i in full), 1) for i in range(count)}
    taken = Counter(turns.next(1, loads) for _ in range(asked))
    can = {path for i, path in enumerate(paths) if i not in full}
    assert set(taken) <= (can or {NO_PATH})
    if can:
        assert max(taken.values()) - min(taken[path] for path in can) <= 1
