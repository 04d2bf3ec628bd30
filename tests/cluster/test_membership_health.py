"""Local health after Lifeguard: nacks, and that whoever is slow is slow to accuse others."""

import pytest

from pxd.cluster.membership import Membership
from pxd.cluster.messages import Ack, Claim, Nack, News, Ping, PingRequest
from tests.cluster.single import CONFIG, member, record, run, run_answered, sent, tell

EMPTY = News()


def worst_health(
    membership: Membership, silent: str, nacking: str, until: float = 6.0, as_: str = ""
) -> int:
    """The worst that is seen while everybody answers at once but `silent`, of whom only those in
    `nacking` say that it does not, each for itself or all as `as_`."""
    worst = 0
    while membership.next_wakeup <= until:
        now = membership.next_wakeup
        membership.tick(now)
        worst = max(worst, membership.health)
        for peer, message in membership.take_outbox():
            if isinstance(message, Ping) and peer != silent:
                membership.receive(now, peer, Ack(seq=message.seq, news=EMPTY))
            elif isinstance(message, PingRequest) and peer in nacking:
                membership.receive(now, as_ or peer, Nack(seq=message.seq, news=EMPTY))
    return worst


def of_four(**config: float) -> Membership:
    """`me`, `a`, `b` and `c`, all connected."""
    membership = member(record("a"), record("b"), record("c"), **config)
    for peer in "abc":
        membership.connected(peer)
    membership.take_outbox()
    return membership


def test_helpers_that_answer_show_that_the_fault_is_not_here() -> None:
    membership = of_four()
    assert worst_health(membership, "a", nacking="bc") == 0
    assert membership.members["a"].state != "alive"


def test_every_missing_nack_counts() -> None:
    assert worst_health(of_four(), "a", nacking="b") == 1
    assert worst_health(of_four(), "a", nacking="") == 2


def test_helpers_that_cannot_be_reached_prove_nothing() -> None:
    membership = of_four()
    membership.disconnected(0.0, "b")
    membership.receive(0.0, "b", Ack(seq=1, news=EMPTY))
    membership.disconnected(0.0, "c")
    membership.receive(0.0, "c", Ack(seq=2, news=EMPTY))
    assert worst_health(membership, "a", nacking="") == 0


def test_without_helpers_a_failed_probe_itself_counts() -> None:
    membership = member(record("a"))
    membership.connected("a")
    assert worst_health(membership, "a", nacking="") >= 1


def test_a_lost_connection_says_nothing_about_this_node() -> None:
    membership = of_four()
    membership.disconnected(0.0, "a")
    membership.tick(CONFIG.lost_timeout)
    assert membership.members["a"].state == "suspect"
    assert membership.health == 0


def test_being_suspected_is_a_bad_sign_and_answers_are_good_ones() -> None:
    membership = of_four()
    for life in (1, 2):
        tell(membership, Claim("me", "suspect", life, "a"), now=0.1)
    assert membership.health == 2
    worst_health(membership, "nobody", "", 10.0)
    assert membership.health == 0


def test_it_has_an_end() -> None:
    membership = member(record("a"), record("b"), max_ill_health=3, drop_after=1e9)
    for life in range(1, 4):
        tell(membership, Claim("me", "suspect", life, "a"), now=0.1)
    assert membership.health == 3
    tell(membership, Claim("me", "suspect", 4, "a"), now=5.1)
    assert membership.record.incarnation == 5
    assert membership.health == 3


def test_ill_health_ends_when_there_is_nobody_left_to_judge() -> None:
    membership = member(record("a"))
    membership.connected("a")
    run(membership, 30.0)
    assert membership.members["a"].state == "dead"
    assert membership.health == 0


@pytest.mark.parametrize("health", [0, 1, 3])
def test_ill_health_stretches_the_probes(health: int) -> None:
    membership = of_four(refutation_burst=9.0)
    for life in range(1, health + 1):
        tell(membership, Claim("me", "suspect", life, "a"), now=0.0)
    while all(member.state == "alive" for member in membership.members.values()):
        now = membership.next_wakeup
        membership.tick(now)
    length = (health + 1) * CONFIG.probe_interval
    assert length <= now <= length + CONFIG.probe_interval, "the first probe comes at random"


def test_a_helper_says_in_time_that_it_has_heard_nothing() -> None:
    membership = member(record("target"))
    membership.receive(0.1, "asker", PingRequest(seq=77, target="target", news=EMPTY))
    ((_, ping),) = sent(membership, Ping)
    assert isinstance(ping, Ping)
    assert membership.next_wakeup <= 0.1 + CONFIG.nack_timeout
    membership.tick(0.1 + CONFIG.nack_timeout)
    ((peer, nack),) = sent(membership, Nack)
    assert peer == "asker"
    assert isinstance(nack, Nack)
    assert nack.seq == 77
    membership.receive(0.6, "target", Ack(seq=ping.seq, news=EMPTY))
    ((peer, ack),) = sent(membership, Ack)
    assert peer == "asker", "late is better than never"
    assert isinstance(ack, Ack)
    membership.tick(1.5)
    assert not sent(membership, Nack)


def test_a_helper_that_was_answered_does_not_nack() -> None:
    membership = member(record("target"))
    membership.receive(0.1, "asker", PingRequest(seq=77, target="target", news=EMPTY))
    ((_, ping),) = sent(membership, Ping)
    assert isinstance(ping, Ping)
    membership.receive(0.2, "target", Ack(seq=ping.seq, news=EMPTY))
    membership.take_outbox()
    membership.tick(0.1 + CONFIG.nack_timeout)
    assert not sent(membership, Nack)


def test_only_those_who_were_asked_can_nack() -> None:
    assert worst_health(of_four(), "a", nacking="bc", as_="teller") == 2


def test_those_who_can_be_reached_are_asked_first() -> None:
    membership = member(*(record(name) for name in "abcdefgh"))
    near = set("bdf")
    for peer in near:
        membership.connected(peer)
    membership.disconnected(0.0, "a")
    assert {peer for peer, _ in sent(membership, PingRequest)} == near


def test_many_who_are_not_there_are_found_out_many_at_a_time() -> None:
    ghosts = [record(f"ghost{i}") for i in range(200)]
    membership = member(record("real"), *ghosts)
    membership.connected("real")
    run_answered(membership, 30.0, lambda node: node == "real")
    doubted = [m for m in membership.members.values() if m.state in ("suspect", "dead")]
    assert len(doubted) == 200
    run_answered(membership, 90.0, lambda node: node == "real")
    assert {node for node, m in membership.members.items() if m.live} == {"me", "real"}


def test_a_helper_that_does_not_know_the_target_says_so_at_once() -> None:
    membership = of_four()
    membership.receive(1.0, "b", PingRequest(seq=7, target="stranger", news=EMPTY))
    assert [(peer, m.seq) for peer, m in sent(membership, Nack)] == [("b", 7)]
