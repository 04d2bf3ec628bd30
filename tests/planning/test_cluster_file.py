"""Reading a cluster file: what it may say, and what is refused in which words."""

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pxd.planning.cluster_file import MAX_BYTES, MAX_NODES, parse_cluster
from pxd.planning.links import Link
from pxd.planning.machines import find_machine
from pxd.planning.model import NodeOffer

CARD = {"tflops_fp16": 165.0, "memory_gib": 24, "memory_bandwidth_gbps": 1008}
A = {"id": "a", **CARD}
B = {"id": "b", "machine": "rtx-4090"}


def cluster(*nodes: dict[str, Any], **more: Any) -> bytes:
    return json.dumps({"nodes": list(nodes), **more}).encode()


def refusal(raw: bytes) -> str:
    with pytest.raises(ValueError) as caught:
        parse_cluster(raw)
    message = str(caught.value)
    assert message.isprintable()
    assert len(message) < 400
    return message


def test_figures_are_those_of_one_gpu() -> None:
    found = parse_cluster(cluster({**A, "device": "cuda", "num_gpus": 2}))
    assert found.offers == (NodeOffer("a", 48 << 30, 330.0, 2016.0),)
    assert found.machines == {"a": "2x cuda 24 GiB"}


def test_memory_is_rounded_down_once_for_the_whole_node() -> None:
    third = parse_cluster(cluster({**A, "memory_gib": 1 / 3, "num_gpus": 3}))
    assert third.offers[0].memory == 1 << 30


def test_a_machine_of_the_catalogue() -> None:
    found = parse_cluster(cluster(B))
    assert found.offers == (find_machine("rtx-4090").offer("b"),)
    assert found.machines == {"b": "rtx-4090"}


def test_own_figures_go_before_those_of_the_catalogue() -> None:
    found = parse_cluster(cluster({**B, "memory_gib": 48}))
    expected = find_machine("rtx-4090")
    assert found.offers == (NodeOffer("b", 48 << 30, expected.tflops, expected.bandwidth),)
    assert found.machines == {"b": "rtx-4090, changed"}


def test_memory_gb_is_another_name_of_memory_gib() -> None:
    figures = {key: value for key, value in A.items() if key != "memory_gib"}
    assert parse_cluster(cluster({**figures, "memory_gb": 24})) == parse_cluster(cluster(A))
    assert "differ" in refusal(cluster({**A, "memory_gb": 23}))


def test_several_alike() -> None:
    found = parse_cluster(cluster({**B, "count": 3}, rtt_ms={"b-1": {"b-3": 2}}))
    assert [offer.id for offer in found.offers] == ["b-1", "b-2", "b-3"]
    assert found.links == (Link("b-1", "b-3", rtt=0.002),)


def test_links_in_seconds_and_gigabytes_a_second() -> None:
    found = parse_cluster(
        cluster(A, B, rtt_ms={"a": {"b": 0.5}}, bandwidth_gbps={"b": {"a": 1.25}})
    )
    assert found.links == (Link("a", "b", rtt=0.0005), Link("b", "a", bandwidth=1.25))


def test_no_round_trip_time_is_not_an_unknown_one() -> None:
    (link,) = parse_cluster(cluster(A, B, rtt_ms={"a": {"b": 0, "a": 0}})).links
    assert 0 < link.rtt < 1e-6


def test_the_order_of_one_pipeline() -> None:
    assert parse_cluster(cluster(A, B, water_fill_only=["b", "a"])).order == ("b", "a")
    assert parse_cluster(cluster(A, B, water_fill_only=None)).order == ()


def test_whether_all_nodes_run_mlx() -> None:
    mac = {"id": "c", "machine": "m2-16"}
    assert parse_cluster(cluster(mac)).all_mlx
    assert not parse_cluster(cluster(mac, B)).all_mlx


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "it is not JSON: input data was truncated"),
        (b"hello", "it is not JSON: invalid character at line 1, column 1: 'hello'"),
        (b'{"nodes": [\n {"id": "a\xff"}]}', "it is not JSON: 'utf-8' codec can't decode"),
        (b"[]", "expected an object, got a list"),
        (b"{}", "it lacks the field `nodes`"),
        (cluster(), "nodes: expected a list of length >= 1"),
        (b'{"nodes": {}}', "nodes: expected a list, got an object"),
        (cluster({}), "nodes[0]: it lacks the field `id`"),
        (cluster(A, A), "nodes[1] ('a'): there is another node 'a'"),
        (cluster({**B, "count": 2}, {**B, "id": "b-2"}), "nodes[1] ('b-2'): there is another"),
        (cluster({**A, "id": ""}), "nodes[0].id: expected a text of length >= 1"),
        (cluster({**A, "id": "a" * 129}), "nodes[0].id: expected a text of length <= 128"),
        (cluster({**A, "id": "\x1b[31m"}), "an id must be printable"),
        (cluster({**A, "num_gpu": 2}), "nodes[0]: there is no such field `num_gpu`"),
        (cluster({**A, "\x1b\n": 2}), "there is no such field `\ufffd\ufffd`"),
        (cluster(A, **{"x" * 100_000: 2}), "there is no such field `xxx"),
        (cluster({**A, "num_gpus": 0}), "nodes[0].num_gpus: expected a whole number >= 1"),
        (cluster({**A, "memory_gib": -24}), "nodes[0].memory_gib: expected a number > 0.0"),
        (cluster({**A, "memory_gib": "24"}), "nodes[0].memory_gib: expected a number, got a text"),
        (cluster({**A, "memory_gib": 1e300}), "nodes[0].memory_gib: expected a number <= "),
        (cluster({"id": "a", "memory_gib": float("nan")}), "line 1, column 38: 'NaN}]}'"),
        (
            cluster({"id": "a", "memory_gib": 24}),
            "nodes[0] ('a'): tflops_fp16 is missing, and so is a machine to take it from",
        ),
        (
            cluster({"id": "a", "machine": "rtx-4900"}),
            "nodes[0] ('a'): there is no machine 'rtx-4900' in the catalogue; did you mean rtx-4",
        ),
        (cluster({**A, "count": MAX_NODES}, B), f"nodes: there are more than {MAX_NODES}"),
        (cluster(A, rtt_ms={"a": {"x": 1}}), "rtt_ms: there is no node 'x' among the nodes"),
        (cluster(A, rtt_ms={"x": {}}), "rtt_ms: there is no node 'x' among the nodes"),
        (cluster(A, B, rtt_ms={"a": {"b": -1}}), "rtt_ms['a']['b']: -1 ms is no round-trip time"),
        (cluster(A, bandwidth_gbps={"a": {"x": 1}}), "bandwidth_gbps: there is no node 'x'"),
        (cluster(A, B, bandwidth_gbps={"a": {"b": 0}}), "['a']['b']: 0 GB/s is no bandwidth"),
        (cluster(A, water_fill_only=["x"]), "water_fill_only: there is no node 'x'"),
        (cluster(A, water_fill_only=["a", "a"]), "water_fill_only: it must name one or more"),
        (cluster(A, water_fill_only=[]), "water_fill_only: it must name one or more"),
        (b" " * (MAX_BYTES + 1), "it has more than 1 MiB"),
        (b'{"rtt_ms":' + b"[" * 100_000, "rtt_ms: expected an object, got a list"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_what_is_refused(raw: bytes, message: str) -> None:
    assert message in refusal(raw)


_VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
_NODES = st.dictionaries(st.sampled_from([*A, "machine", "count", "num_gpus"]), _VALUES)
_FILES = st.fixed_dictionaries(
    {"nodes": st.lists(_NODES, max_size=3)},
    optional={"rtt_ms": _VALUES, "bandwidth_gbps": _VALUES, "water_fill_only": _VALUES},
)


@settings(deadline=None)
@given(_FILES.map(lambda file: json.dumps(file).encode()) | st.binary(max_size=60))
def test_any_file_is_read_or_refused_in_one_line(raw: bytes) -> None:
    problem = ""
    try:
        assert parse_cluster(raw).offers
    except ValueError as error:
        problem = str(error)
    assert problem.isprintable()
