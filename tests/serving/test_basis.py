"""What plans follow from."""

import msgspec

from pxd.cluster.claims import stage_bytes
from pxd.cluster.members import Member
from pxd.cluster.messages import MemberState
from pxd.cluster.plans import ModelPlan, StagePlan
from pxd.cluster.records import Device, NodeRecord, PeerLink
from pxd.planning.auto.problem import known_speeds
from pxd.planning.capacity import budget
from pxd.planning.result import Basis
from pxd.serving.basis import inputs_of
from tests.planning.clusters import model_of


def member(name: str, state: MemberState = "alive", **more: object) -> Member:
    record = NodeRecord(id=name, name=name, **{"device": Device(), "memory": 1, **more})  # type: ignore[arg-type]
    return Member(record, state, 0.0, 1)


def test_only_nodes_that_are_there_and_mean_to_stay_take_part() -> None:
    members = {
        "a": member("a"),
        "b": member("b", "suspect"),
        "c": member("c", "dead"),
        "d": member("d", "left"),
        "e": member("e", leaving=True),
        "f": member("f", device=None),
    }
    inputs = inputs_of("m", model_of(4), members)
    assert [offer.id for offer in inputs.offers] == ["a", "b"]


def test_quantised_weights_take_more_where_pytorch_holds_them() -> None:
    """Of the same memory, a third as many stored bytes are planned, read at a third of the speed;
    what the stage then takes from other models is what it really has."""
    cost = msgspec.structs.replace(model_of(4), expansion=3.0)
    members = {
        kind: member(kind, device=Device(executors=(kind,), bandwidth=60.0), memory=64 << 30)
        for kind in ("mlx", "torch")
    }
    inputs = inputs_of("m", cost, members)
    mlx, torch = (budget(offer, cost, inputs.settings) for offer in inputs.offers)
    assert (torch.weights, torch.kv) == (mlx.weights // 3, mlx.kv)
    assert [speed for _, speed in known_speeds(inputs.offers)] == [60.0, 20.0]
    plan = ModelPlan(
        name="m",
        pipelines=(),
        basis=Basis(inputs=inputs),
    )
    taken = [stage_bytes(plan, StagePlan(kind, 1, 3, 5)) - 5 for kind in ("mlx", "torch")]
    assert taken == [sum(cost.layer_bytes[1:3]), 3 * sum(cost.layer_bytes[1:3])]


def test_links_carry_round_trip_and_bandwidth_to_those_who_take_part() -> None:
    links = (PeerLink("b", 0.0113, 1.25), PeerLink("gone", 0.5))
    inputs = inputs_of("m", model_of(4), {"a": member("a", links=links), "b": member("b")})
    [link] = inputs.links
    assert (link.a, link.b, round(link.rtt, 6), link.bandwidth) == ("a", "b", 0.01, 1.25)
