"""What people may call a node."""

import pytest

from pxd.serving.doorview import NodeRef
from pxd.serving.names import resolve

ANNA, BEN, TWIN = (f"12D3KooW{letter * 44}" for letter in "ABC")
KNOWN = {ANNA: "anna", BEN: "ben", TWIN: "ben"}


@pytest.mark.parametrize("wanted", ["anna", ANNA, ANNA[:9]])
def test_by_name_by_id_or_by_its_beginning(wanted: str) -> None:
    assert resolve(wanted, KNOWN) == NodeRef(id=ANNA, name="anna")


@pytest.mark.parametrize("wanted", ["ben", "12D3KooW", "1"])
def test_what_may_be_several_nodes_is_asked_back(wanted: str) -> None:
    with pytest.raises(LookupError, match=f"give the peer id of one.*{BEN}"):
        resolve(wanted, KNOWN)


@pytest.mark.parametrize("wanted", ["", "ann", "12D3KooWD", "ben "])
def test_nobody(wanted: str) -> None:
    with pytest.raises(LookupError, match="known here: anna, ben, ben"):
        resolve(wanted, KNOWN)


def test_a_whole_peer_id_may_be_of_a_stranger() -> None:
    stranger = "12D3KooW" + "D" * 44
    assert resolve(stranger, KNOWN) == NodeRef(id=stranger, name="")
    with pytest.raises(LookupError):
        resolve(stranger, KNOWN, known_only=True)


def test_a_name_that_looks_like_the_beginning_of_an_id_is_a_name() -> None:
    assert resolve("12D3", KNOWN | {"x": "12D3"}).id == "x"
