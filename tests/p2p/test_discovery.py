"""The dial loop on a virtual clock: for ever, with back-off, and one log line per change."""

import logging
import random

import pytest
import trio
from trio.testing import MockClock

from pxd.p2p.backoff import Backoff
from pxd.p2p.discovery import LONGEST_DELAY, Discovery
from pxd.p2p.host import DialFailed
from pxd.p2p.sessions import Sessions


class FakeSession:
    def __init__(self) -> None:
        self.ended = trio.Event()


class FakeSessions(Sessions):
    """Peers that the test lets in and out."""

    def __init__(self) -> None:
        super().__init__("me")
        self.fakes: dict[str, FakeSession] = {}

    def get(self, peer: str) -> FakeSession | None:  # type: ignore[override]
        return self.fakes.get(peer)

    def let_in(self, peer: str) -> None:
        self.fakes[peer] = FakeSession()
        self._notify(peer, True)

    def let_out(self, peer: str) -> None:
        session = self.fakes.pop(peer)
        session.ended.set()
        self._notify(peer, False)


class FakeDialer:
    def __init__(self, sessions: FakeSessions) -> None:
        self.sessions = sessions
        self.failure: DialFailed | None = DialFailed("unreachable", "no answer")
        self.times: list[float] = []

    async def dial(self, peer: str) -> DialFailed | None:
        await trio.lowlevel.checkpoint()
        self.times.append(trio.current_time())
        if self.failure is None:
            self.sessions.let_in(peer)
        return self.failure


@pytest.fixture
def sessions() -> FakeSessions:
    return FakeSessions()


@pytest.fixture
def dialer(sessions: FakeSessions) -> FakeDialer:
    return FakeDialer(sessions)


@pytest.fixture
async def discovery(
    nursery: trio.Nursery,
    sessions: FakeSessions,
    dialer: FakeDialer,
) -> Discovery:
    return Discovery(nursery, dialer, sessions, random.Random(1))  # type: ignore[arg-type]


async def test_it_never_gives_up_and_logs_once(
    discovery: Discovery,
    dialer: FakeDialer,
    caplog: pytest.LogCaptureFixture,
    autojump_clock: MockClock,
) -> None:
    with caplog.at_level(logging.INFO, "pxd.p2p"):
        discovery.seek("peer", wanted=True)
        await trio.sleep(86400)
        assert [record.levelname for record in caplog.records] == ["WARNING"]
        assert "no answer" in caplog.text
        assert 86400 / LONGEST_DELAY <= len(dialer.times) <= 2 * 86400 / LONGEST_DELAY + 10
        dialer.failure = None
        await trio.sleep(LONGEST_DELAY)
        assert "connected with peer" in caplog.records[-1].getMessage()
        assert len(caplog.records) == 2


async def test_a_lost_peer_is_dialled_again_within_seconds(
    discovery: Discovery,
    dialer: FakeDialer,
    sessions: FakeSessions,
    autojump_clock: MockClock,
) -> None:
    dialer.failure = None
    discovery.seek("peer")
    await trio.sleep(1000)
    assert len(dialer.times) == 1
    lost = trio.current_time()
    sessions.let_out("peer")
    await trio.sleep(1)
    assert len(dialer.times) == 2
    assert dialer.times[-1] - lost <= 1


async def test_a_sighting_leads_to_an_attempt_at_once_but_not_where_refused(
    discovery: Discovery,
    dialer: FakeDialer,
    autojump_clock: MockClock,
) -> None:
    discovery.seek("peer")
    await trio.sleep(1000)
    before = len(dialer.times)
    discovery.seek("peer")
    await trio.sleep(0.01)
    assert len(dialer.times) == before + 1
    dialer.failure = DialFailed("wrong-key", "another cluster")
    await trio.sleep(LONGEST_DELAY)
    before = len(dialer.times)
    discovery.seek("peer")
    await trio.sleep(1)
    assert len(dialer.times) == before
    await trio.sleep(3600)
    assert before + 3600 / 90 - 1 <= len(dialer.times) <= before + 3600 / 60


async def test_after_a_move_everybody_is_tried_at_once_and_often_again(
    discovery: Discovery, dialer: FakeDialer, autojump_clock: MockClock
) -> None:
    dialer.failure = DialFailed("wrong-key", "another cluster")
    discovery.seek("peer")
    await trio.sleep(1000)
    dialer.failure = DialFailed("unreachable", "no answer")
    before = len(dialer.times)
    discovery.try_again()
    await trio.sleep(5)
    assert before + 4 <= len(dialer.times) <= before + 6


async def test_a_peer_that_came_by_itself_is_sought_once_it_is_lost(
    discovery: Discovery,
    dialer: FakeDialer,
    sessions: FakeSessions,
    autojump_clock: MockClock,
) -> None:
    sessions.let_in("visitor")
    await trio.sleep(10)
    assert not dialer.times
    sessions.let_out("visitor")
    await trio.sleep(1)
    assert dialer.times


def test_backoff_doubles_up_to_its_longest_and_starts_again() -> None:
    backoff = Backoff(1.0, 10.0, random.Random(3))
    delays = [backoff.next() for _ in range(2000)]
    for number, delay in enumerate(delays):
        full = min(10.0, 2.0 ** min(number, 10))
        assert full / 2 <= delay <= full
    backoff.reset()
    assert backoff.next() <= 1.0
