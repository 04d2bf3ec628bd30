"""`pxd plan` for programs: its JSON against the public vectors, and the live cluster."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pxd.models.catalog import DEMO_DIRECTORY
from pxd.planning.model import ModelCost, NodeOffer
from pxd.planning.result import PlanInputs
from pxd.serving.basis import PLAN_SETTINGS
from pxd.serving.view import Planning
from tests.api.fakes import LiveServer, live_server
from tests.cli.tools import pxd, run

VECTORS: dict[str, Any] = json.loads((Path(__file__).parent / "data/plan_vectors.json").read_text())
RATIOS = (VECTORS["param_ratio"], VECTORS["kv_ratio"])

Plan = Callable[..., dict[str, Any]]
Ranges = list[list[int]]


@pytest.fixture
def plan(tmp_path: Path) -> Plan:
    """Plans the vectors' model of so many layers for their GPUs, named a, b, c and so on."""

    def run_plan(
        layers: int,
        gpus: list[str],
        *options: str,
        ratios: tuple[float, float] = RATIOS,
        **more: object,
    ) -> dict[str, Any]:
        nodes = [
            {"id": node, **VECTORS["gpus"][gpu]}
            for node, gpu in zip("abcdefgh", gpus, strict=False)
        ]
        (tmp_path / "cluster.json").write_text(json.dumps({"nodes": nodes, **more}))
        (tmp_path / "model.json").write_text(json.dumps(VECTORS["model"] | {"num_layers": layers}))
        weights, kv = ratios
        result = pxd(
            *("plan", "--model", str(tmp_path / "model.json")),
            *("--cluster", str(tmp_path / "cluster.json")),
            *("--param-ratio", str(weights), "--kv-ratio", str(kv), "--json", *options),
        )
        assert result.stderr == ""
        answer: dict[str, Any] = json.loads(result.stdout)
        assert result.exit_code == (1 if answer["reason"] else 0)
        return answer

    return run_plan


def ranges(answer: dict[str, Any]) -> Ranges:
    return [[s["start"], s["end"]] for pipeline in answer["pipelines"] for s in pipeline]


def counts(answer: dict[str, Any]) -> list[int]:
    return sorted(end - start for start, end in ranges(answer))


@pytest.mark.parametrize("gpu", VECTORS["capacities"])
def test_capacities(plan: Plan, gpu: str) -> None:
    (node,) = plan(8, [gpu])["nodes"]
    assert node["capacity"] == VECTORS["capacities"][gpu]


def test_capacities_follow_the_ratio_of_weights_alone(plan: Plan) -> None:
    nodes = plan(8, list(VECTORS["capacities"]), ratios=(0.65, 0.25))["nodes"]
    assert [node["capacity"]["plain"] for node in nodes] == [17, 8, 6, 5]
    assert [node["capacity"]["embed+lm_head"] for node in nodes] == [16, 7, 6, 4]
    other = plan(8, list(VECTORS["capacities"]), ratios=(0.65, 0.1))["nodes"]
    assert [node["capacity"] for node in other] == [node["capacity"] for node in nodes]


@pytest.mark.parametrize("case", VECTORS["water_filling"], ids=lambda case: str(case["layers"]))
def test_water_filling(plan: Plan, case: dict[str, Any]) -> None:
    gpus = sorted(case["gpus"], key=lambda gpu: -VECTORS["gpus"][gpu]["memory_gb"])
    order = list("abcde"[: len(gpus)])
    answer = plan(case["layers"], gpus, water_fill_only=order)
    (pipeline,) = answer["pipelines"]
    assert [stage["node"] for stage in pipeline] == order
    assert counts(answer) == sorted(case["counts"])
    assert answer["leftovers"] == []


@pytest.mark.parametrize(
    "case", VECTORS["allocators"], ids=lambda c: f"{c['layers']}-{c['strategy']}"
)
def test_allocators(plan: Plan, case: dict[str, Any]) -> None:
    answer = plan(case["layers"], case["gpus"], "--strategy", case["strategy"])
    assert sorted(ranges(answer)) == sorted(case["ranges"])
    used = {stage["node"] for pipeline in answer["pipelines"] for stage in pipeline}
    spare = {leftover["node"] for leftover in answer["leftovers"]}
    assert used | spare == set("abcdefgh"[: len(case["gpus"])])
    assert not used & spare


@pytest.mark.parametrize(
    "case", VECTORS["with_leftovers"], ids=lambda c: f"{c['layers']}-{c['strategy']}"
)
def test_allocators_with_leftovers(plan: Plan, case: dict[str, Any]) -> None:
    answer = plan(case["layers"], case["gpus"], "--strategy", case["strategy"])
    expected = case["expected"]
    found = ranges(answer)
    if "ranges" in expected:
        assert sorted(found) == sorted(expected["ranges"])
    if "sum_of_layers" in expected:
        assert sum(counts(answer)) == expected["sum_of_layers"]
        assert len(found) >= expected["min_assigned_nodes"]
    if "node_list_len" in expected:
        named = [stage["node"] for pipeline in answer["pipelines"] for stage in pipeline]
        named += [leftover["node"] for leftover in answer["leftovers"]]
        assert sorted(named) == list("abc"[: expected["node_list_len"]])


@pytest.mark.parametrize("strategy", ["auto", "greedy", "dp"])
def test_other_ratios_follow_from_the_same_definitions(plan: Plan, strategy: str) -> None:
    gpus = ["a100-80g", "rtx5090", "rtx5090", "rtx4090", "rtx4090"]
    answer = plan(14, gpus, "--strategy", strategy, ratios=(0.65, 0.25))
    nodes = {node["id"]: node["capacity"] for node in answer["nodes"]}
    assert answer["pipelines"], "the large card alone holds as many layers now"
    for pipeline in answer["pipelines"]:
        assert [stage["start"] for stage in pipeline[1:]] == [s["end"] for s in pipeline[:-1]]
        assert (pipeline[0]["start"], pipeline[-1]["end"]) == (0, 14)
        for place, stage in enumerate(pipeline):
            ends = ["embed"] * (place == 0) + ["lm_head"] * (place == len(pipeline) - 1)
            room = nodes[stage["node"]]["+".join(ends) or "plain"]
            assert stage["end"] - stage["start"] <= room


def test_auto_predicts_at_least_as_much_as_the_classic_allocators(plan: Plan) -> None:
    gpus = ["a100-80g", "a100-80g", "a100-40g", "a100-40g", "rtx4090", "rtx4090"]
    objectives = {
        strategy: plan(22, gpus, "--strategy", strategy)["predicted"]["objective"]
        for strategy in ("auto", "greedy", "dp")
    }
    assert objectives["auto"] >= max(objectives.values())


def test_the_shape_of_the_answer(plan: Plan) -> None:
    answer = plan(7, ["rtx4090", "rtx5090", "rtx4090"], rtt_ms={"a": {"b": 3.0}})
    assert answer["reason"] is None
    assert answer["missing_gib"] is None
    assert answer["settings"] == {
        "strategy": "auto",
        "param_ratio": 0.5,
        "kv_ratio": 0.3,
        "prompt_tokens": 1024,
        "output_tokens": 256,
    }
    (pipeline,) = answer["pipelines"]
    assert all(stage.keys() == {"node", "start", "end"} for stage in pipeline)
    predicted = answer["predicted"]
    (figures,) = predicted["pipelines"]
    assert predicted["tokens_per_s"] == figures["tokens_per_s"] > 0
    assert figures["ttft_ms"] > figures["token_ms"] > 0
    assert figures["requests"] >= 1
    assert figures["bottleneck"] in {stage["node"] for stage in pipeline}
    assert [stage["node"] for stage in figures["stages"]] == [stage["node"] for stage in pipeline]
    assert all(
        stage["decode_ms"] > 0 and stage["prefill_ms"] > 0 and stage["hop_ms"] >= 0
        for stage in figures["stages"]
    )
    by_id = {node["id"]: node for node in answer["nodes"]}
    assert by_id["a"]["memory_gib"] == 24
    assert by_id["a"]["weight_gib"] == 12
    assert by_id["a"]["kv_gib"] == pytest.approx(7.2)
    for stage in pipeline:
        node = by_id[stage["node"]]
        assert node["kv_gib"] < node["used_gib"] <= node["weight_gib"] + node["kv_gib"]


def test_a_leftover_without_use_has_no_range(plan: Plan) -> None:
    """A stage of the large card holds more than the small one could."""
    answer = plan(13, ["a100-80g", "a100-80g", "rtx4090"], "--strategy", "greedy")
    (leftover,) = answer["leftovers"]
    assert leftover == {"node": "c", "start": None, "end": None}


def test_what_is_missing_and_what_would_fill_the_gap(plan: Plan) -> None:
    answer = plan(12, ["rtx4090", "rtx4090"], "--what-if", "A100 80GB", "--what-if", "t4")
    assert answer["pipelines"] == []
    assert answer["predicted"] == {"tokens_per_s": 0, "objective": 0, "pipelines": []}
    assert {leftover["node"] for leftover in answer["leftovers"]} == {"a", "b"}
    assert "GiB are missing" in answer["reason"]
    needed = (12 * 3211591680 + 2 * 1158266880) / 0.5 / 2**30
    assert answer["missing_gib"] == pytest.approx(needed - 48)
    by_machine = {each["machine"]: each for each in answer["one_more"]["candidates"]}
    assert by_machine["a100-80"]["fits"]
    assert by_machine["a100-80"]["gain"] == by_machine["a100-80"]["tokens_per_s"] > 0
    assert not by_machine["t4"]["fits"]
    assert by_machine["t4"]["missing_gib"] == pytest.approx(needed - 48 - 16)
    assert not by_machine["cuda 24 GiB"]["fits"], "another like those that are there"


def test_one_more_of_each_kind(plan: Plan) -> None:
    answer = plan(7, ["rtx4090", "rtx5090", "rtx4090"], "--what-if", "h200")
    candidates = answer["one_more"]["candidates"]
    assert {each["machine"]: each["like"] for each in candidates} == {
        "cuda 24 GiB": "a",
        "cuda 32 GiB": "b",
        "h200": None,
    }
    rates = [each["tokens_per_s"] for each in candidates]
    assert rates == sorted(rates, reverse=True)
    now = answer["predicted"]["tokens_per_s"]
    assert all(each["gain"] == pytest.approx(each["tokens_per_s"] - now) for each in candidates)
    assert candidates[0]["machine"] == "h200"
    assert candidates[0]["gain"] > 0


def test_one_more_machine_is_as_near_as_the_one_it_equals(plan: Plan) -> None:
    """Two cards far from each other gain more from a third where the first is than from afar."""
    far = {"a": {"b": 400.0, "c": 0.5}, "b": {"c": 400.0}}
    answer = plan(7, ["rtx4090", "rtx5090", "rtx4090"], "--what-if", "rtx-5090", rtt_ms=far)
    by_machine = {each["machine"]: each for each in answer["one_more"]["candidates"]}
    assert by_machine["cuda 24 GiB"]["gain"] > 0


def test_large_clusters_are_planned_once(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"nodes": [{"id": "a", "machine": "m1-8", "count": 65}]}')
    answer = json.loads(pxd("plan", "--model", "demo", "--cluster", str(path), "--json").stdout)
    assert len(answer["nodes"]) == 65
    assert answer["one_more"]["candidates"] == []
    assert "64 nodes" in answer["one_more"]["skipped"]


def test_an_order_that_cannot_hold_the_model(plan: Plan) -> None:
    answer = plan(12, ["a100-80g", "rtx4090", "rtx4090"], water_fill_only=["b", "c"])
    assert answer["pipelines"] == []
    assert "GiB are missing" in answer["reason"]
    assert answer["missing_gib"] > 0


def test_the_order_decides_where_capacity_is_tight(tmp_path: Path) -> None:
    """Only the larger node has room for the head beside its layers."""
    config = {
        "hidden_dim": 1024,
        "intermediate_dim": 4096,
        "num_attention_heads": 16,
        "num_kv_heads": 16,
        "vocab_size": 400_000,
        "num_layers": 4,
    }
    (tmp_path / "model.json").write_text(json.dumps(config))
    nodes = [
        {"id": name, "tflops_fp16": 10, "memory_gib": memory, "memory_bandwidth_gbps": 100}
        for name, memory in (("small", 0.5), ("large", 4))
    ]
    found = {}
    for order in (["large"], ["small", "large"]):
        path = tmp_path / "cluster.json"
        path.write_text(json.dumps({"nodes": nodes, "water_fill_only": order}))
        result = pxd(
            *("plan", "--model", str(tmp_path / "model.json"), "--cluster", str(path), "--json")
        )
        answer = json.loads(result.stdout)
        found[tuple(order)] = (result.exit_code, answer["reason"], answer["missing_gib"])
    assert found["large",] == (0, None, None)
    code, reason, missing = found["small", "large"]
    assert code == 1
    assert reason == "the nodes of water_fill_only cannot hold the model in this order"
    assert missing == 0


def test_the_order_of_nodes_in_the_file_changes_nothing(plan: Plan) -> None:
    gpus = ["a100-80g", "rtx5090", "rtx4090", "rtx4090"]
    first, second = plan(14, gpus), plan(14, gpus[::-1])
    assert first["predicted"]["objective"] == second["predicted"]["objective"]
    assert sorted(ranges(first)) == sorted(ranges(second))


@pytest.mark.parametrize("model", ["demo", "directory", "config"])
def test_a_model_from_its_files(model: str, tmp_path: Path) -> None:
    names = {"directory": str(DEMO_DIRECTORY), "config": str(DEMO_DIRECTORY / "config.json")}
    path = tmp_path / "cluster.json"
    path.write_text('{"nodes": [{"id": "a", "machine": "m1-8"}]}')
    result = pxd("plan", "--model", names.get(model, model), "--cluster", str(path), "--json")
    answer = json.loads(result.stdout)
    assert answer["pipelines"] == [[{"node": "a", "start": 0, "end": answer["model"]["layers"]}]]


ANNA, BEN = "12D3KooWAnna", "12D3KooWBenn"


@pytest.fixture
def live() -> Planning:
    layers = 4
    model = ModelCost(
        layer_bytes=(1 << 30,) * layers,
        embedding_bytes=1 << 28,
        head_bytes=1 << 28,
        tied=False,
        kv_bytes_per_token=(4096,) * layers,
        splits=(1, 2, 3),
        layer_flops=(1 << 30,) * layers,
        hidden_size=1024,
    )
    offers = (
        NodeOffer(ANNA, 5 << 30, 4.0, 100.0),
        NodeOffer(BEN, 4 << 30, 2.0, 80.0, max_layers=2),
    )
    inputs = PlanInputs(model=model, offers=offers, settings=PLAN_SETTINGS)
    return Planning("big", inputs, {ANNA: "anna", BEN: "ben"})


@pytest.fixture
def server(live: Planning) -> Any:
    with live_server() as server:
        server.daemon.plans = live
        yield server


def test_the_live_cluster(server: LiveServer) -> None:
    answer = json.loads(pxd("plan", "--node", server.url, "--json").stdout)
    assert answer["model"]["name"] == "big"
    assert {stage["node"] for stage in answer["pipelines"][0]} == {ANNA, BEN}
    assert answer["nodes"][1]["capacity"]["plain"] == 2, "no more than --max-layers of the node"
    assert answer["settings"]["param_ratio"] == PLAN_SETTINGS.weight_share


def test_the_live_cluster_in_a_pipe(server: LiveServer) -> None:
    result = pxd("plan", "--node", server.url, "--what-if", "m1-16")
    assert result.exit_code == 0
    assert "big: 4 layers, 4.5 GiB of weights" in result.stdout
    assert re.search(r"^anna  \[\d,\d\) ", result.stdout, re.MULTILINE)
    assert "another like anna" in result.stdout
    assert "12D3KooW" not in result.stdout


def test_nodes_of_one_name_are_told_apart(server: LiveServer, live: Planning) -> None:
    server.daemon.plans = msgspec.structs.replace(live, names={ANNA: "mac", BEN: "mac"})
    text = pxd("plan", "--node", server.url).stdout
    assert "mac~WAnna" in text
    assert "mac~WBenn" in text


def test_another_model_on_the_live_cluster(server: LiveServer) -> None:
    answer = json.loads(pxd("plan", "--node", server.url, "--model", "demo", "--json").stdout)
    assert answer["model"]["name"] == "demo"
    assert answer["pipelines"] == [[{"node": ANNA, "start": 0, "end": 8}]]


def test_a_daemon_without_a_plan(server: LiveServer) -> None:
    server.daemon.plans = None
    result = pxd("plan", "--node", server.url)
    assert (result.exit_code, result.stdout) == (1, "")
    assert result.stderr.count("\n") == 1


def test_no_daemon() -> None:
    result = pxd("plan")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "no daemon runs" in result.stderr


def test_the_catalogue() -> None:
    text = pxd("plan", "--machines").stdout
    assert "\nrtx-4090 " in text
    assert "GB/s" in text
    machines = json.loads(pxd("plan", "--machines", "--json").stdout)
    assert len(machines) == text.count("\n") - 1
    assert machines[0].keys() >= {"name", "tflops", "memory_gib", "bandwidth", "source"}


def test_as_a_process(tmp_path: Path) -> None:
    path = tmp_path / "cluster.json"
    path.write_text('{"nodes": [{"id": "a", "machine": "m1-8"}]}')
    result = run("plan", "--model", "demo", "--cluster", str(path), PYTHONIOENCODING="ascii")
    assert result.returncode == 0
    assert result.stderr == ""
    assert "\x1b" not in result.stdout
    assert "a     [0,8)" in result.stdout


def test_the_help_says_what_is_usual() -> None:
    text = " ".join(pxd("plan", "--help").stdout.replace("│", "").split())
    assert f"by default {PLAN_SETTINGS.weight_share:g}" in text
    assert f"by default {PLAN_SETTINGS.kv_share:g}" in text
    assert "gigabytes a second" in text
    assert "All of that memory counts" in text
