import msgspec

from pxd.cluster.messages import Claim
from pxd.cluster.records import NodeRecord
from pxd.cluster.signing import evidence, goodbye, is_genuine, is_proven, seal, unseal
from tests.signers import FakeSigner

SIGNER = FakeSigner("a")
RECORD = NodeRecord(id="a", name="a", incarnation=3, version=4, memory=5)


def test_a_sealed_record_is_genuine_and_opens_as_what_it_was() -> None:
    sealed = seal(RECORD, SIGNER)
    assert (sealed.node, sealed.order) == ("a", (3, 4))
    assert is_genuine(sealed, SIGNER)
    assert unseal(sealed) == RECORD


def test_every_part_of_it_is_signed() -> None:
    sealed = seal(RECORD, SIGNER)
    for change in (
        {"node": "b"},
        {"incarnation": 4},
        {"version": 5},
        {"content": sealed.content + b"\0"},
        {"signature": bytes(64)},
    ):
        assert not is_genuine(msgspec.structs.replace(sealed, **change), SIGNER)


def test_the_outside_must_be_that_of_the_inside() -> None:
    sealed = seal(RECORD, SIGNER)
    for change in ({"node": "b"}, {"incarnation": 4}, {"version": 5}, {"content": b"\xc1"}):
        assert unseal(msgspec.structs.replace(sealed, **change)) is None


def test_a_goodbye_is_of_one_node_and_one_life() -> None:
    proof = goodbye("a", 3, SIGNER)
    assert is_proven(Claim("a", "left", 3, "x", proof), SIGNER)
    assert not is_proven(Claim("a", "left", 4, "x", proof), SIGNER)
    assert not is_proven(Claim("b", "left", 3, "x", proof), SIGNER)
    assert not is_proven(Claim("a", "left", 3, "x"), SIGNER)


def test_evidence_of_a_life_is_no_goodbye_and_the_other_way_round() -> None:
    proof = evidence(seal(RECORD, SIGNER))
    assert is_proven(Claim("a", "dead", 3, "x", proof), SIGNER)
    assert not is_proven(Claim("a", "dead", 4, "x", proof), SIGNER)
    assert not is_proven(Claim("b", "dead", 3, "x", proof), SIGNER)
    assert not is_proven(Claim("a", "left", 3, "x", proof), SIGNER)
    assert not is_proven(Claim("a", "left", 3, "x", proof[-64:]), SIGNER)
    assert not is_proven(Claim("a", "dead", 3, "x", goodbye("a", 3, SIGNER)), SIGNER)
