"""A machine that returns under a new identity takes the place of its dead one."""

import pytest

from pxd.cluster.endpoints import Endpoints
from pxd.cluster.membership import Membership
from pxd.cluster.messages import Claim
from pxd.cluster.records import NodeRecord
from tests.cluster.single import CONFIG, kinds, left, member, membership_of, news, record, run, tell


def at(node: str, *places: str, incarnation: int = 1) -> NodeRecord:
    addresses = tuple(f"/ip4/{place.replace(':', '/tcp/')}/p2p/{node}" for place in places)
    return record(node, incarnation, addresses=addresses)


def kill(membership: Membership, node: str) -> None:
    incarnation = membership.members[node].record.incarnation
    tell(membership, Claim(node, "suspect", incarnation, "b"))
    while membership.members.get(node) and membership.members[node].live:
        membership.tick(membership.next_wakeup)


@pytest.mark.parametrize("place", ["192.0.2.7:8471", "127.0.0.1:8471"])
def test_a_dead_node_is_dropped_when_another_one_listens_in_its_place(place: str) -> None:
    membership = member(at("old", "198.51.100.1:1", place))
    kill(membership, "old")
    membership.take_events()
    membership.receive(5.0, "teller", news(at("new", place, "203.0.113.1:2")))
    assert set(membership.members) == {"me", "new"}
    assert kinds(membership) == [("joined", "new"), ("dropped", "old")]
    membership.receive(6.0, "teller", news(at("old", place)))
    assert "old" not in membership.members, "there is a tombstone"
    membership.receive(6.0, "old", news(at("old", place, incarnation=2)))
    assert membership.members["old"].state == "alive", "a later life is still welcome"


def test_nor_does_it_stay_when_it_dies_after_the_other_one_came() -> None:
    membership = member(at("old", "192.0.2.7:8471"), at("new", "192.0.2.7:8471"))
    assert membership.members["old"].state == "alive", "nobody alive is touched"
    tell(membership, Claim("old", "suspect", 1, "b"))
    membership.receive(0.1, "new", news(at("new", "192.0.2.7:8471", incarnation=2)))
    assert membership.members["old"].state == "suspect", "nor a suspect"
    membership.take_events()
    kill(membership, "old")
    assert set(membership.members) == {"me", "new"}
    assert [event for event in kinds(membership) if event[1] == "old"] == [
        ("died", "old"),
        ("dropped", "old"),
    ]


def test_the_own_address_counts_too() -> None:
    membership = membership_of(at("me", "192.0.2.7:8471"))
    membership.receive(0.0, "teller", news(at("old", "192.0.2.7:8471")))
    kill(membership, "old")
    assert set(membership.members) == {"me"}


def test_an_address_learnt_later_counts_too() -> None:
    membership = member(at("old", "192.0.2.7:8471"), record("new"))
    kill(membership, "old")
    assert "old" in membership.members
    membership.receive(5.0, "new", news(at("new", "192.0.2.7:8471", incarnation=2)))
    assert "old" not in membership.members


@pytest.mark.parametrize(
    "addresses",
    [
        ("/ip4/192.0.2.7/tcp/8472/p2p/new",),
        ("/ip4/192.0.2.8/tcp/8471/p2p/new",),
        ("/ip4/192.0.2.7/tcp/8471/p2p/relay/p2p-circuit/p2p/new",),
        ("/ip4/192.0.2.7/tcp/8471/p2p/old",),
        ("/ip4/192.0.2.7/tcp/8471", "nonsense", "/"),
        (),
    ],
    ids=["port", "host", "relayed", "somebody else's", "nonsense", "none"],
)
def test_other_addresses_replace_nobody(addresses: tuple[str, ...]) -> None:
    membership = member(at("old", "192.0.2.7:8471"))
    kill(membership, "old")
    membership.receive(5.0, "teller", news(record("new", addresses=addresses)))
    assert membership.members["old"].state == "dead"


def test_whoever_said_goodbye_may_stay_for_its_time() -> None:
    membership = member(at("old", "192.0.2.7:8471"))
    tell(membership, left("old"))
    membership.receive(5.0, "teller", news(at("new", "192.0.2.7:8471")))
    assert membership.members["old"].state == "left"


def test_the_dead_replace_nobody() -> None:
    membership = member(at("one", "192.0.2.7:8471"), at("two", "192.0.2.7:8471"))
    tell(membership, left("two"))
    kill(membership, "one")
    assert membership.members["one"].state == "dead"
    run(membership, 2 * CONFIG.drop_after)
    assert set(membership.members) == {"me"}


def test_the_index_forgets_and_stays_small() -> None:
    endpoints = Endpoints()
    for index in range(100):
        endpoints.put(at(f"n{index:03}", "192.0.2.7:8471"))
    assert len(endpoints.sharing("n000")) < 10
    endpoints.put(at("n000", "192.0.2.8:8471"))
    assert not endpoints.sharing("n000")
    for index in range(100):
        endpoints.remove(f"n{index:03}")
    assert not endpoints._nodes
    assert not endpoints._listed
    assert not endpoints._addresses
