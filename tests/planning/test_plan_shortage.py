from pxd.planning.model import ModelCost, NodeOffer, PlanSettings, Shortage
from pxd.planning.planner import plan_cluster
from pxd.planning.result import PlanInputs
from pxd.planning.shortage import gib

GIB = 2**30
SETTINGS = PlanSettings(weight_share=0.5, kv_share=0.5, min_kv_tokens=0)


def shortage(layers: int, layer_bytes: int, *nodes: NodeOffer) -> Shortage:
    model = ModelCost(
        layer_bytes=(layer_bytes,) * layers,
        embedding_bytes=0,
        head_bytes=0,
        tied=False,
        kv_bytes_per_token=(0,) * layers,
        splits=tuple(range(1, layers)),
    )
    plan = plan_cluster(PlanInputs(model=model, offers=nodes, settings=SETTINGS))
    assert not plan.pipelines
    assert plan.shortage is not None
    return plan.shortage


def test_too_little_memory() -> None:
    found = shortage(8, GIB, NodeOffer("a", 5 * GIB), NodeOffer("b", 6 * GIB))
    assert found.reason == (
        "the model needs 16.0 GiB of memory, the 2 nodes offer 11.0 GiB: 5.0 GiB are missing"
    )
    assert (found.needed_bytes, found.offered_bytes) == (16 * GIB, 11 * GIB)
    assert found.missing_bytes == 5 * GIB
    assert found.missing_layers == 8 - 2 - 3


def test_tiny_sizes_stay_readable() -> None:
    found = shortage(5, 333_000, NodeOffer("a", 1_070_000))
    assert found.reason == (
        "the model needs 0.0031 GiB of memory, the node offers 0.0010 GiB: 0.0021 GiB are missing"
    )


def test_a_small_gap_between_large_figures_shows_in_all_of_them() -> None:
    found = shortage(8, GIB, NodeOffer("a", 16 * GIB - 5_000_000))
    assert found.reason == (
        "the model needs 16.0000 GiB of memory, the node offers 15.9953 GiB: 0.0047 GiB are missing"
    )


def test_no_nodes() -> None:
    found = shortage(4, GIB)
    assert found.reason == "the model needs 8.0 GiB of memory and no node offers any"
    assert found.missing_bytes == 8 * GIB


def test_layer_limits() -> None:
    found = shortage(
        6, GIB, NodeOffer("a", 99 * GIB, max_layers=3), NodeOffer("b", 99 * GIB, max_layers=2)
    )
    assert found.reason == (
        "the model has 6 layers, the layer limits of the 2 nodes allow 5: "
        "1 layer (2.0 GiB) are left over"
    )
    assert found.missing_bytes == 2 * GIB


def test_layers_that_fit_in_sum_only() -> None:
    found = shortage(3, 2 * GIB, NodeOffer("a", 6 * GIB), NodeOffer("b", 6 * GIB))
    assert found.reason == (
        "the model needs 12.0 GiB of memory and the 2 nodes offer 12.0 GiB, but its layers cannot "
        "be cut to fit: 1 layer (4.0 GiB) are left over"
    )


def test_gib() -> None:
    assert gib(0) == "0.0 GiB"
    assert gib(2 * GIB) == "2.0 GiB"
    assert gib(1) == "0.000000001 GiB"
