import math
import random

import pytest

from pxd.cluster.leadership import (
    LeaderChanged,
    Leadership,
    LeadershipConfig,
    LeadershipEvent,
    LeftOffice,
    TookOffice,
)
from pxd.cluster.members import Member
from pxd.cluster.messages import LAST_COUNT, MemberState
from pxd.cluster.plans import Epoch
from pxd.cluster.records import NodeRecord

CONFIG = LeadershipConfig(settle_alone=0.3, settle=1.0, settle_lonely=6.0, stable=1.0)


class View:
    """A membership view that a test can change at will."""

    def __init__(self) -> None:
        self.members: dict[str, Member] = {}
        self.put("me")

    def put(
        self,
        node: str,
        state: MemberState = "alive",
        *,
        vanished: bool = False,
        **fields: object,
    ) -> None:
        record = NodeRecord(id=node, name=node, **fields)  # type: ignore[arg-type]
        self.members[node] = Member(record, state, 0.0, 0, vanished=vanished)


def leadership(term: int = 0, *, expects_peers: bool = False) -> Leadership:
    machine = Leadership("me", CONFIG, term=term, expects_peers=expects_peers)
    machine.start(0.0)
    return machine


def drive(
    machine: Leadership, view: View, until: float, *, synced: bool = True, since: float = 0.0
) -> list[tuple[float, LeadershipEvent]]:
    """Observe at `since` and then whenever the machine asks for it."""
    events = [(since, event) for event in machine.observe(since, view.members, synced=synced)]
    while machine.next_wakeup <= until:
        now = machine.next_wakeup
        events += [(now, event) for event in machine.observe(now, view.members, synced=synced)]
    return events


def test_a_fresh_node_leads_itself_almost_at_once() -> None:
    machine = leadership()
    events = drive(machine, View(), 10.0, synced=False)
    assert events == [(0.3, LeaderChanged("me", 0)), (0.3, TookOffice("me", 1))]
    assert (machine.seniority, machine.leads, machine.in_office) == (1, 1, True)
    assert machine.next_wakeup == math.inf


def test_one_that_expects_peers_waits_for_them() -> None:
    machine = leadership(expects_peers=True)
    assert drive(machine, View(), 5.9, synced=False) == []
    assert (6.0, TookOffice("me", 1)) in drive(machine, View(), 10.0, synced=False, since=5.9)


def test_a_newcomer_takes_the_last_place_and_does_not_lead() -> None:
    machine, view = leadership(expects_peers=True), View()
    view.put("a", seniority=1, leads=4, term=4)
    view.put("b", seniority=7)
    events = drive(machine, view, 10.0)
    assert events == [(0.0, LeaderChanged("a", 4))]
    assert (machine.seniority, machine.term, machine.in_office) == (8, 4, False)


@pytest.mark.parametrize(
    ("rivals", "leader"),
    [
        ({"a": {"seniority": 2}, "b": {"seniority": 3}}, "a"),
        ({"b": {"seniority": 2}, "a": {"seniority": 2}}, "a"),
        ({"a": {"seniority": 2}, "b": {"seniority": 9, "priority": 1}}, "b"),
        ({"a": {"seniority": 0}, "b": {"seniority": 9}}, "b"),
        ({"a": {"seniority": 1, "state": "dead"}, "b": {"seniority": 9}}, "b"),
        ({"a": {"seniority": 1, "state": "suspect"}, "b": {"seniority": 9}}, "a"),
        ({"a": {"seniority": 1, "state": "left"}}, None),
    ],
)
def test_who_leads(rivals: dict[str, dict[str, object]], leader: str | None) -> None:
    machine, view = leadership(expects_peers=True), View()
    for node, fields in rivals.items():
        view.put(node, **fields)  # type: ignore[arg-type]
    machine.observe(0.0, view.members, synced=True)
    assert machine.leader == leader


def successor(view: View) -> Leadership:
    """`me`, settled as the second in line behind `a`, who leads term 4."""
    view.put("a", seniority=1, leads=4, term=4)
    view.put("b", seniority=3)
    machine = leadership()
    machine.seniority = 2
    machine.observe(0.0, view.members, synced=True)
    return machine


def test_a_dead_leader_is_followed_after_a_stable_time() -> None:
    view = View()
    machine = successor(view)
    view.put("a", "dead", vanished=True, seniority=1, leads=4, term=4)
    events = drive(machine, view, 30.0, since=10.0)
    assert events == [(10.0, LeaderChanged("me", 4)), (11.0, TookOffice("me", 5))]


def test_a_goodbye_hands_over_at_once() -> None:
    view = View()
    machine = successor(view)
    view.put("a", "left", seniority=1, leads=4, term=4)
    events = drive(machine, view, 30.0, since=10.0)
    assert events == [(10.0, LeaderChanged("me", 4)), (10.0, TookOffice("me", 5))]


def test_a_leader_that_recovers_in_time_is_not_followed() -> None:
    view = View()
    machine = successor(view)
    view.put("a", "dead", vanished=True, seniority=1, leads=4, term=4)
    drive(machine, view, 10.9, since=10.0)
    view.put("a", "alive", seniority=1, leads=4, term=4)
    events = drive(machine, view, 30.0, since=10.9)
    assert events == [(10.9, LeaderChanged("a", 4))]


def test_one_that_was_followed_while_away_does_not_take_the_lead_back() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 2.0)
    view.put("z", seniority=5, leads=3, term=3)
    events = drive(machine, view, 30.0, since=3.0)
    assert events == [(3.0, LeaderChanged("z", 3)), (3.0, LeftOffice("z", 3))]
    view.put("z", "dead", seniority=5, leads=3, term=3)
    events = drive(machine, view, 60.0, since=40.0)
    assert [event for _, event in events] == [LeaderChanged("me", 3), TookOffice("me", 4)]


def test_a_greater_priority_takes_the_lead_from_whoever_holds_it() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 2.0)
    view.put("z", seniority=5, priority=1)
    assert drive(machine, view, 30.0, since=3.0)[0] == (3.0, LeaderChanged("z", 1))


def test_after_a_partition_the_lesser_one_steps_down() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 1.0)
    assert machine.in_office
    view.put("a", seniority=1, leads=1, term=1)
    events = drive(machine, view, 30.0, since=2.0)
    assert events == [(2.0, LeaderChanged("a", 1)), (2.0, LeftOffice("a", 1))]


@pytest.mark.parametrize(
    "rival",
    [
        {"leads": 1, "term": 1},
        {"term": 5},
        {"plan": Epoch(1, "z", 8)},
        {"plan": Epoch(9, "me", 8)},
    ],
    ids=["same term", "heard of a term", "plan of same term", "plan of past life"],
)
def test_the_remaining_leader_outbids_every_term(rival: dict[str, object]) -> None:
    machine, view = leadership(), View()
    drive(machine, view, 2.0)
    view.put("z", seniority=5, **rival)  # type: ignore[arg-type]
    events = drive(machine, view, 30.0, since=3.0)
    highest = max(1, *(plan_term(value) for value in rival.values()))
    assert events == [(4.0, TookOffice("me", highest + 1))]


def plan_term(value: object) -> int:
    assert isinstance(value, int | Epoch)
    return value.term if isinstance(value, Epoch) else value


def test_terms_do_not_race() -> None:
    """Should two nodes hold themselves for the leader for long, each bids once per second."""
    machine, view = leadership(), View()
    drive(machine, view, 2.0)
    taken = 0
    for step in range(100):
        view.put("z", seniority=5, leads=machine.leads, term=machine.term)
        events = machine.observe(3.0 + step * 0.1, view.members, synced=True)
        taken += sum(isinstance(event, TookOffice) for event in events)
    assert taken == 9


def test_a_persisted_term_is_never_reused() -> None:
    machine = leadership(term=41)
    assert (0.3, TookOffice("me", 42)) in drive(machine, View(), 1.0, synced=False)


def test_leaving_ends_the_office() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 1.0)
    view.put("me", "left", seniority=1, leads=1, term=1)
    assert machine.observe(2.0, view.members, synced=True) == [
        LeaderChanged(None, 1),
        LeftOffice(None, 1),
    ]


def test_one_that_is_about_to_leave_hands_over_at_once() -> None:
    view = View()
    machine = successor(view)
    view.put("a", seniority=1, leads=4, term=4, leaving=True)
    events = drive(machine, view, 30.0, since=10.0)
    assert events == [(10.0, LeaderChanged("me", 4)), (10.0, TookOffice("me", 5))]


def test_whoever_announces_to_leave_leads_no_longer() -> None:
    machine, view = leadership(), View()
    view.put("b", seniority=2)
    drive(machine, view, 2.0)
    machine.seniority = 1
    drive(machine, view, 5.0, since=2.0)
    assert machine.in_office
    view.put("me", seniority=1, leads=machine.leads, term=machine.term, leaving=True)
    events = drive(machine, view, 30.0, since=5.0)
    assert events == [
        (5.0, LeaderChanged("b", machine.term)),
        (5.0, LeftOffice("b", machine.term)),
    ]


def test_when_all_are_leaving_nobody_leads() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 1.0)
    view.put("a", seniority=2, leaving=True)
    view.put("me", seniority=1, leaving=True)
    assert machine.observe(2.0, view.members, synced=True)[0] == LeaderChanged(None, 1)


@pytest.mark.parametrize("raised", ["me", "b"])
def test_a_change_of_priority_changes_the_leader_once(raised: str) -> None:
    view = View()
    machine = successor(view)
    view.put(raised, seniority=2 if raised == "me" else 3, priority=1)
    events = drive(machine, view, 30.0, since=10.0)
    assert events[0] == (10.0, LeaderChanged(raised, 4))
    assert events[1:] == ([(11.0, TookOffice("me", 5))] if raised == "me" else [])
    # The one before steps down when it sees the same.
    view.put("a", seniority=1, leads=0, term=machine.term)
    assert drive(machine, view, 60.0, since=31.0) == []


def test_a_leader_that_restarts_is_believed_its_new_term() -> None:
    view = View()
    machine = successor(view)
    machine.seniority = 3
    view.put("b", seniority=2)
    view.put("a", incarnation=2, seniority=0, term=4)
    assert drive(machine, view, 30.0, since=10.0) == [(10.0, LeaderChanged("b", 4))]
    view.put("b", "dead", seniority=2)
    view.put("a", incarnation=2, seniority=1, term=4)
    assert drive(machine, view, 60.0, since=31.0) == [(31.0, LeaderChanged("a", 4))]
    view.put("a", incarnation=2, seniority=1, leads=5, term=5)
    drive(machine, view, 61.0, since=60.0)
    assert (machine.leader, machine.term, machine.in_office) == ("a", 5, False)


@pytest.mark.parametrize(
    "absurd", [{"term": LAST_COUNT}, {"leads": LAST_COUNT}, {"plan": Epoch(LAST_COUNT, "z", 1)}]
)
def test_one_absurd_record_does_not_use_up_all_terms(absurd: dict[str, object]) -> None:
    machine, view, most = leadership(), View(), 1 << 40
    drive(machine, view, 2.0)
    view.put("z", seniority=5, **absurd)  # type: ignore[arg-type]
    for now in range(3, 100):
        assert machine.observe(float(now), view.members, synced=True, most=most) == []
    assert machine.leads == machine.term == 1
    view.put("y", seniority=6, term=most)
    machine.observe(100.0, view.members, synced=True, most=most)
    machine.observe(102.0, view.members, synced=True, most=most)
    assert machine.leads == machine.term == most + 1


def test_a_plan_made_up_in_the_leader_s_name_is_outbid() -> None:
    machine, view = leadership(), View()
    drive(machine, view, 2.0)
    view.put("me", plan=Epoch(machine.leads, "me", 3), seniority=1)
    drive(machine, view, 4.0, since=3.0)
    assert machine.leads == 1
    view.put("z", seniority=5, plan=Epoch(1, "me", LAST_COUNT))
    drive(machine, view, 7.0, since=5.0)
    assert machine.leads == machine.term == 2


def test_at_the_end_of_all_terms_and_places_nothing_breaks() -> None:
    machine, view = leadership(LAST_COUNT), View()
    view.put("z", seniority=LAST_COUNT)
    drive(machine, view, 10.0)
    assert (machine.term, machine.seniority) == (LAST_COUNT, LAST_COUNT)
    assert machine.leader == "me"


def test_looking_at_the_changed_alone_leads_to_the_same_conclusions() -> None:
    dice = random.Random(4)
    for _ in range(60):
        view = View()
        whole, partial = leadership(), leadership()
        for step in range(40):
            node = dice.choice(["a", "b", "c", "d"])
            if node in view.members and dice.random() < 0.2:
                del view.members[node]
            else:
                view.put(
                    node,
                    dice.choice(["alive", "suspect", "dead", "left"]),
                    priority=dice.choice([0, 0, 1]),
                    seniority=dice.choice([0, 1, 2, 3]),
                    leads=dice.choice([0, 0, 1, 2, 1 << 22]),
                    leaving=dice.random() < 0.1,
                )
            now = 0.5 * step
            events = whole.observe(now, view.members, synced=True)
            assert partial.observe(now, view.members, synced=True, changed=[node]) == events
            assert (whole.leader, whole.term, whole.leads) == (
                partial.leader,
                partial.term,
                partial.leads,
            )
            assert whole.next_wakeup == partial.next_wakeup


def three_leaders() -> tuple[Leadership, View]:
    """ "a" leads, and "b" and "c" would come before this node."""
    machine, view = leadership(), View()
    view.put("me", seniority=4)
    for seniority, node in enumerate("abc", 1):
        view.put(node, seniority=seniority, leads=1 if node == "a" else 0, term=1)
    machine.seniority = 4
    drive(machine, view, 1.0)
    assert machine.leader == "a"
    return machine, view


def test_a_silent_leader_is_waited_for_and_longer_when_leaders_have_just_changed() -> None:
    machine, view = three_leaders()
    view.put("a", "dead", seniority=1, leads=1)
    events = drive(machine, view, 16.0, since=10.0)
    assert [(when, event.leader) for when, event in events] == [(10.0 + CONFIG.patience, "b")]
    view.put("b", "dead", seniority=2, leads=2, term=2)
    assert drive(machine, view, 24.9, since=20.0) == []
    # It is back before anybody has followed it.
    view.put("b", seniority=2, leads=2, term=2)
    drive(machine, view, 30.0, since=25.0)
    assert machine.leader == "b"
    # The next silence counts from its own beginning.
    view.put("b", "dead", seniority=2, leads=2, term=2)
    events = drive(machine, view, 60.0, since=31.0)
    assert [(when, event.leader) for when, event in events] == [(31.0 + CONFIG.long_patience, "c")]


def test_a_silent_leader_is_waited_for_longer_when_others_are_silent_too() -> None:
    machine, view = three_leaders()
    view.put("c", "suspect", seniority=3)
    view.put("a", "dead", seniority=1, leads=1)
    events = drive(machine, view, 60.0, since=10.0)
    assert [(when, event.leader) for when, event in events] == [(10.0 + CONFIG.long_patience, "b")]


def test_who_hears_nobody_gives_a_silent_leader_the_most_time() -> None:
    machine, view = three_leaders()
    view.put("b", "suspect", seniority=2)
    view.put("c", "suspect", seniority=3)
    view.put("a", "dead", seniority=1, leads=1)
    assert drive(machine, view, 15.0, since=10.0) == []
    # One of them is heard again, which does not make the leader's silence any less doubtful.
    view.put("c", seniority=3)
    events = drive(machine, view, 60.0, since=15.0)
    assert [(when, event.leader) for when, event in events] == [(10.0 + CONFIG.deaf_patience, "b")]


def test_the_other_one_of_two_does_not_take_a_silent_leader_for_its_own_deafness() -> None:
    machine, view = leadership(), View()
    view.put("me", seniority=2)
    view.put("a", seniority=1, leads=1, term=1)
    machine.seniority = 2
    drive(machine, view, 1.0)
    view.put("a", "dead", seniority=1, leads=1)
    assert drive(machine, view, 9.9 + CONFIG.patience, since=10.0) == []
    assert drive(machine, view, 11.0 + CONFIG.patience, since=10.0)
    assert machine.leader == "me"


def test_a_leader_whose_process_has_ended_is_followed_at_once() -> None:
    machine, view = three_leaders()
    for now, (node, follower) in ((10.0, ("a", "b")), (20.0, ("b", "c"))):
        leads = int(now / 10)
        view.put(node, "dead", vanished=True, seniority=leads, leads=leads, term=leads)
        events = drive(machine, view, now, since=now)
        assert [(when, event.leader) for when, event in events] == [(now, follower)]


def test_long_patience_ends_with_the_unrest() -> None:
    machine, view = three_leaders()
    view.put("a", "dead", vanished=True, seniority=1, leads=1)
    drive(machine, view, 10.0, since=10.0)
    view.put("b", seniority=2, leads=2, term=2)
    drive(machine, view, 11.0, since=11.0)
    view.put("b", "dead", seniority=2, leads=2, term=2)
    began = 10.0 + CONFIG.calm
    events = drive(machine, view, 90.0, since=began)
    assert [(when, event.leader) for when, event in events] == [(began + CONFIG.patience, "c")]
