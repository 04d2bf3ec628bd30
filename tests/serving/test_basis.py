"""What plans follow from."""

from pxd.cluster.members import Member
from pxd.cluster.messages import MemberState
from pxd.cluster.records import Device, NodeRecord, PeerLink
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


def test_links_carry_round_trip_and_bandwidth_to_those_who_take_part() -> None:
    links = (PeerLink("b", 0.0113, 1.25), PeerLink("gone", 0.5))
    inputs = inputs_of("m", model_of(4), {"a": member("a", links=links), "b": member("b")})
    [link] = inputs.links
    assert (link.a, link.b, round(link.rtt, 6), link.bandwidth) == ("a", "b", 0.01, 1.25)
