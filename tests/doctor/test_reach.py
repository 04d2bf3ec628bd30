"""What is said of other nodes' attempts to connect."""

import msgspec
import pytest

from pxd.doctor.facts import Peer
from pxd.doctor.firewall import Firewall
from pxd.doctor.packets import Judgement
from pxd.doctor.reach import Asked, choose, reach, reached
from pxd.p2p.reach import DialBackAnswer, Dialled, Outcome

from .patients import ETH, TUNNEL, address, facts, levels, only, peer

BEN, CARL = peer("ben", "10.0.0.2"), peer("carl", "10.0.0.3")
HERE = peer("dora", "10.0.0.1", here=True)


def tried(who: Peer, *results: tuple[str, Outcome, Outcome]) -> Asked:
    dialled = (Dialled(address("me", host), listen, data) for host, listen, data in results)
    return Asked(who, DialBackAnswer(tuple(dialled)))


def test_others_on_different_machines_are_asked_first() -> None:
    twin = peer("evil", "10.0.0.2")
    assert choose([HERE, BEN, twin, CARL]) == [BEN, CARL, twin]
    assert choose([HERE]) == [HERE]
    assert choose([]) == []


def test_all_is_well() -> None:
    asked = [tried(BEN, ("10.0.0.1", "ok", "ok")), tried(CARL, ("10.0.0.1", "ok", "ok"))]
    found = reach(facts(BEN, CARL), asked, ())
    assert levels(found) == {"reach": "ok", "data-port": "ok"}
    assert "ben and carl can connect to this machine on port 8471" in found[0].text
    assert reached(asked) is True


def test_some_addresses_fail() -> None:
    here = facts(BEN, interfaces=(ETH, TUNNEL))
    asked = [tried(BEN, ("10.0.0.1", "ok", "ok"), ("10.8.0.1", "timeout", "timeout"))]
    first, data = reach(here, asked, ())
    assert (first.level, data.level) == ("note", "ok")
    assert "not at 10.8.0.1 (wg0): no answer, which is fine" in first.text


@pytest.mark.parametrize(
    ("outcome", "words"),
    [("timeout", "no answer"), ("refused", "refused"), ("unreachable", "no r")],
)
def test_nobody_can_connect(outcome: Outcome, words: str) -> None:
    asked = [tried(BEN, ("10.0.0.1", outcome, outcome)), tried(CARL, ("10.0.0.1", outcome, "ok"))]
    wall = Firewall(
        name="ufw", state="on", judgements={("tcp", 8471): Judgement("blocked", "", "x")}
    )
    found = only(reach(facts(BEN, CARL), asked, (wall,)))
    assert found.level == "problem"
    assert f"ben and carl cannot connect to this machine on port 8471: {words}" in found.text
    assert "open TCP 8471 in ufw" in found.remedy
    assert "from ben: 10.0.0.1 (eth0)" in found.details[0]
    assert reached(asked) is False


def test_who_gave_no_answer_is_told_beside_those_who_tried() -> None:
    asked = [Asked(BEN, None, "no answer within 7 s"), tried(CARL, ("10.0.0.1", "timeout", "ok"))]
    found = only(reach(facts(BEN, CARL), asked, ()))
    assert found.text.startswith("carl cannot connect")
    assert found.details[0] == "from ben: no answer within 7 s"


def test_another_node_has_the_address() -> None:
    found = only(reach(facts(BEN), [tried(BEN, ("10.0.0.1", "other", "ok"))], ()))
    assert found.level == "problem"
    assert "another machine has this one's address" in found.remedy


def test_only_some_can_connect() -> None:
    asked = [tried(BEN, ("10.0.0.1", "ok", "ok")), tried(CARL, ("10.0.0.1", "timeout", "timeout"))]
    found = reach(facts(BEN, CARL), asked, ())
    assert levels(found) == {"reach": "warning", "data-port": "ok"}
    assert "but carl cannot" in found[0].text


def test_only_the_data_port_is_shut() -> None:
    asked = [tried(BEN, ("10.0.0.1", "ok", "refused"))]
    found = reach(facts(BEN), asked, ())
    assert levels(found) == {"reach": "ok", "data-port": "warning"}
    assert "slower way" in found[1].text
    assert "TCP 8472" in found[1].remedy


def test_the_data_port_counts_where_the_listen_port_works() -> None:
    """An open port of somebody else at a dead address says nothing."""
    asked = [tried(BEN, ("10.0.0.1", "ok", "refused"), ("10.8.0.1", "timeout", "ok"))]
    assert levels(reach(facts(BEN), asked, ()))["data-port"] == "warning"


def test_a_node_without_a_data_port() -> None:
    asked = [tried(BEN, ("10.0.0.1", "ok", "skipped"))]
    assert levels(reach(facts(BEN, ports=(8471, 0)), asked, ())) == {"reach": "ok"}


def test_nodes_on_this_machine_say_nothing_of_firewalls() -> None:
    asked = [tried(HERE, ("10.0.0.1", "ok", "ok"))]
    found = reach(facts(HERE), asked, ())
    assert "nothing about firewalls" in found[0].text
    assert reached(asked) is None


def test_nobody_to_ask() -> None:
    apart = peer("ben", None)
    dead = msgspec.structs.replace(BEN, state="dead")
    for lonely in (facts(), facts(apart), facts(dead)):
        assert only(reach(lonely, [], ())).level == "note"
    assert reached([]) is None
    assert reached(None) is None


@pytest.mark.parametrize(
    ("code", "words"), [("unknown-method", "cannot be asked"), ("too-often", "would try")]
)
def test_nobody_would_try(code: str, words: str) -> None:
    found = only(reach(facts(BEN), [Asked(BEN, None, f"{code}: reason", code)], ()))
    assert found.level == "note"
    assert words in found.text


def test_an_answer_that_dialled_nothing() -> None:
    found = only(reach(facts(BEN), [tried(BEN, ("127.0.0.1", "skipped", "skipped"))], ()))
    assert found.level == "note"


def test_answers_that_came_too_late() -> None:
    assert only(reach(facts(BEN), None, None)).level == "note"
