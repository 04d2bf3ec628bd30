"""When which way is measured, on a clock of the test; and why a node is told to be alone."""

import itertools
import random
from collections.abc import Mapping

from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.records import MAX_LINKS
from pxd.p2p.refusals import Refusal
from pxd.p2p.sightings import Discovered, Sighting
from pxd.serving.hints import hints
from pxd.serving.survey import AGAIN_S, FAILED_S, FIRST_S, GAP_S, MOVED_S, Schedule


class Run:
    """A schedule that is asked every second; every measurement yields what `speeds` says."""

    def __init__(self, seed: int = 1) -> None:
        self.schedule = Schedule(random.Random(seed))
        self.now = 1000.0
        self.began = self.now
        self.measured: list[tuple[float, str]] = []
        self.speeds: dict[str, float] = {}

    def go(self, seconds: float, ways: Mapping[str, str], partners: str = "") -> list[str]:
        """Whom it measured within `seconds`."""
        before = len(self.measured)
        rtts = {peer: 0.001 * (index + 1) for index, peer in enumerate(ways)}
        for _ in range(int(seconds)):
            self.now += 1
            self.schedule.follow(self.now, ways)
            peer = self.schedule.next(self.now, partners, rtts)
            if peer is None:
                continue
            self.measured.append((self.now, peer))
            if self.speeds.get(peer, 1.0):
                self.schedule.measured(self.now, peer, self.speeds.get(peer, 1.0))
            else:
                self.schedule.failed(self.now, peer)
        return [peer for _, peer in self.measured[before:]]


def test_a_new_peer_is_measured_soon_and_then_seldom() -> None:
    run = Run()
    assert run.go(FIRST_S[0] - 1, {"a": "eth"}) == []
    assert run.go(FIRST_S[1], {"a": "eth"}) == ["a"]
    hours = 6 * 3600
    again = run.go(hours, {"a": "eth"})
    assert hours / AGAIN_S[1] - 1 <= len(again) <= hours / AGAIN_S[0] + 1
    assert run.schedule.bandwidths == {"a": 1.0}


def test_one_at_a_time_and_partners_first() -> None:
    run = Run()
    ways = dict.fromkeys("abcdefgh", "eth")
    # All are overdue at once, as after a long spell of work.
    run.schedule.follow(run.now, ways)
    run.now += 1000
    order = run.go(60, ways, partners="gh")
    assert sorted(order) == sorted(ways)
    assert set(order[:2]) == {"g", "h"}
    times = [time for time, _ in run.measured]
    assert all(later - sooner >= GAP_S for sooner, later in itertools.pairwise(times))


def test_no_more_than_a_record_holds_are_measured() -> None:
    run = Run()
    ways = {f"n{i:03}": "eth" for i in range(100)}
    order = run.go(3600, ways, partners="")
    assert set(order) == {f"n{i:03}" for i in range(MAX_LINKS)}


def test_another_way_is_measured_anew_and_the_old_figure_is_worth_nothing() -> None:
    run = Run()
    run.speeds = {"a": 0.01}
    run.go(FIRST_S[1], {"a": "wifi"})
    run.speeds = {"a": 0.03}
    run.go(AGAIN_S[1] + 1, {"a": "wifi"})
    assert run.schedule.bandwidths == {"a": 0.02}
    run.speeds = {"a": 1.0}
    assert run.go(MOVED_S[0] - 1, {"a": "cable"}) == []
    assert run.schedule.bandwidths == {"a": 0.02}
    assert run.go(MOVED_S[1], {"a": "cable"}) == ["a"]
    assert run.schedule.bandwidths == {"a": 1.0}


def test_who_refuses_is_asked_again_ever_more_seldom() -> None:
    run = Run()
    run.speeds = {"a": 0.0}
    asked = run.go(FIRST_S[1] + FAILED_S[1] + 1, {"a": "eth"})
    assert len(asked) == 2
    day = 86400
    assert len(run.go(day, {"a": "eth"})) <= day / AGAIN_S[0] + 6
    assert run.schedule.bandwidths == {}
    run.speeds = {}
    run.go(AGAIN_S[1] + 1, {"a": "eth"})
    assert run.schedule.bandwidths == {"a": 1.0}


def test_who_is_gone_is_forgotten() -> None:
    run = Run()
    run.go(60, {"a": "eth", "b": "eth"})
    assert run.schedule.bandwidths.keys() == {"a", "b"}
    run.go(1, {"b": "eth"})
    assert run.schedule.bandwidths.keys() == {"b"}


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.floats(0, 1e15)), max_size=50), st.integers())
def test_figures_stay_within_what_was_measured(results: list[tuple[str, float]], seed: int) -> None:
    schedule = Schedule(random.Random(seed))
    schedule.follow(0.0, dict.fromkeys("abcd", "eth"))
    for number, (peer, gbs) in enumerate(results):
        schedule.measured(float(number), peer, gbs)
    for peer, known in schedule.bandwidths.items():
        own = [gbs for name, gbs in results if name == peer]
        assert min(own) <= known * (1 + 1e-9)
        assert known <= max(own) * (1 + 1e-9)


NOTHING = Discovered("", (), ())


def hinted(
    discovered: Discovered = NOTHING,
    *refusals: Refusal,
    connected: bool = False,
    expects_peers: bool = True,
    uptime: float = 60.0,
) -> list[str]:
    return hints(
        discovered,
        refusals,
        connected=connected,
        expects_peers=expects_peers,
        uptime=uptime,
        now=1000.0,
    )


def test_a_node_that_is_alone_is_told_why() -> None:
    foreign = Discovered("", (), (Sighting("x", ("/ip4/10.0.0.9/tcp/8471/p2p/x",), 3.0),))
    [another, look] = hinted(foreign)
    assert "another cluster key is on this network, at 10.0.0.9" in another
    assert "pxd doctor" in look
    assert hinted(foreign, connected=True) == []
    assert "no route" in hinted(Discovered("no route", (), ()))[0]
    dial = Refusal("10.0.0.2:8471", "y", "connection refused", 990.0)
    shut = Refusal("10.0.0.3:8471", "z", "wrong-key", 995.0, "refused by 10.0.0.3: get a ticket")
    old = Refusal("10.0.0.4:8471", "z", "wrong-key", 100.0, "long ago")
    assert hinted(NOTHING, old, dial, shut)[:2] == [
        "refused by 10.0.0.3: get a ticket",
        "cannot connect to 10.0.0.2:8471: connection refused",
    ]


def test_a_node_that_was_never_meant_to_have_company_is_left_alone() -> None:
    assert hinted(expects_peers=False) == []
    assert hinted(uptime=5.0) == []
    assert len(hinted()) == 1
