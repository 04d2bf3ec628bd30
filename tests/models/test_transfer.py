"""Whom to ask for what: whatever becomes of asks, each chunk comes once and none is forgotten."""

from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from pxd.models.chunks import CHUNK_BYTES, Chunk
from pxd.models.transfer import ASK_BYTES, ASKS_IN_FLIGHT, RESTS_S, Ask, Transfer, agree

CHUNKS = [
    Chunk(file, number, number * CHUNK_BYTES, CHUNK_BYTES if number % 3 else 1000)
    for file in ("a", "b")
    for number in range(20)
]
SOURCES = ("anna", "ben", "carl")


class TransferMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.transfer = Transfer()
        self.transfer.want(CHUNKS)
        self.now = 0.0
        self.asks: list[Ask] = []
        self.come: list[Chunk] = []
        self.has: dict[str, set[Chunk]] = {}
        self.denied: dict[str, set[Chunk]] = {}
        self.banned: set[str] = set()
        self.resting: dict[str, float] = {}

    @rule(source=st.sampled_from(SOURCES), part=st.sampled_from([0.2, 0.6, 1.0]))
    def offer(self, source: str, part: float) -> None:
        self.has[source] = set(CHUNKS[: int(part * len(CHUNKS))])
        self.denied[source] = set()
        self.transfer.offer(source, self.has[source].__contains__)

    @rule(sparingly=st.booleans())
    def ask(self, sparingly: bool) -> None:
        ask = self.transfer.next(self.now, sparingly=sparingly)
        if ask is None:
            return
        assert ask.source not in self.banned
        assert self.resting.get(ask.source, 0.0) <= self.now
        assert set(ask.chunks) <= self.has[ask.source] - self.denied[ask.source]
        assert len({chunk.file for chunk in ask.chunks}) == 1
        assert sum(chunk.size for chunk in ask.chunks) <= ASK_BYTES
        assert len(ask.chunks) == 1 or not sparingly
        self.asks.append(ask)
        of_source = sum(other.source == ask.source for other in self.asks)
        assert of_source <= (1 if sparingly else ASKS_IN_FLIGHT)

    def _end(self, data: st.DataObject) -> Ask:
        return self.asks.pop(data.draw(st.integers(0, len(self.asks) - 1)))

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def arrived(self, data: st.DataObject) -> None:
        ask = self._end(data)
        self.come.extend(ask.chunks)
        self.transfer.arrived(ask)

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def failed(self, data: st.DataObject) -> None:
        ask = self._end(data)
        self.transfer.failed(ask, self.now)
        if ask.source not in self.banned:
            until = max(self.now + RESTS_S[0], self.resting.get(ask.source, 0.0))
            self.resting[ask.source] = until

    @precondition(lambda self: self.asks)
    @rule(data=st.data())
    def lacked(self, data: st.DataObject) -> None:
        ask = self._end(data)
        self.transfer.lacked(ask)
        self.denied[ask.source].update(ask.chunks)

    @precondition(lambda self: self.asks and len(self.banned) < 2)
    @rule(data=st.data())
    def spoiled(self, data: st.DataObject) -> None:
        ask = self._end(data)
        self.transfer.spoiled(ask)
        self.banned.add(ask.source)

    @rule(seconds=st.sampled_from([0.5, 3.0, 30.0]))
    def wait(self, seconds: float) -> None:
        self.now += seconds

    @invariant()
    def every_chunk_is_somewhere_once(self) -> None:
        under_way = [chunk for ask in self.asks for chunk in ask.chunks]
        known = len(under_way) + len(self.come)
        assert len({*under_way, *self.come}) == known
        assert self.transfer.waiting == len(CHUNKS) - known
        assert self.transfer.asking == len(self.asks)

    def teardown(self) -> None:
        """One good source is enough to bring everything that is left."""
        for ask in self.asks:
            self.transfer.arrived(ask)
            self.come.extend(ask.chunks)
        self.transfer.offer("dora", lambda _: True)
        assert self.transfer.orphan() is None
        while ask := self.transfer.next(self.now):
            self.come.extend(ask.chunks)
            self.transfer.arrived(ask)
        assert self.transfer.idle
        assert sorted(self.come) == sorted(CHUNKS)


TestTransfer = TransferMachine.TestCase


def idle(*sources: str) -> Transfer:
    """A transfer that knows of all its sources that they have nothing else to do."""
    transfer = Transfer()
    transfer.want(CHUNKS)
    for source in sources:
        transfer.offer(source, lambda _: True)
    asks = [transfer.next(0.0) for _ in sources]
    for ask in asks:
        assert ask is not None
        assert len(ask.chunks) == 1
        transfer.arrived(ask)
    return transfer


def test_several_sources_are_asked_at_once() -> None:
    transfer = idle(*SOURCES)
    asked = [transfer.next(0.0).source for _ in range(6)]  # type: ignore[union-attr]
    assert sorted(asked) == sorted(2 * SOURCES)


def test_a_source_that_fails_rests_longer_from_time_to_time() -> None:
    transfer = idle("anna")
    now, rests = 0.0, []
    for _ in range(len(RESTS_S) + 1):
        ask = transfer.next(now)
        assert ask is not None
        transfer.failed(ask, now)
        assert transfer.next(now) is None
        rests.append(transfer.wake_at(now) - now)
        now = transfer.wake_at(now)
    assert rests == [*RESTS_S, RESTS_S[-1]]
    ask = transfer.next(now)
    assert ask is not None
    transfer.arrived(ask)
    assert transfer.wake_at(now) == float("inf")


def test_a_busy_source_is_asked_for_one_chunk_at_a_time() -> None:
    transfer = idle("anna", "ben")
    first = transfer.next(0.0)
    assert first is not None
    assert (first.source, len(first.chunks) > 1) == ("anna", True)
    transfer.arrived(first, busy=True)
    asks = []
    while ask := transfer.next(0.0):
        asks.append(ask)
    assert [len(ask.chunks) for ask in asks if ask.source == "anna"] == [1]
    assert sum(ask.source == "ben" for ask in asks) == ASKS_IN_FLIGHT
    [ask] = [ask for ask in asks if ask.source == "anna"]
    transfer.arrived(ask)
    again = transfer.next(0.0)
    assert again is not None
    assert (again.source, len(again.chunks) > 1) == ("anna", True)


def test_what_nobody_has_is_named() -> None:
    transfer = Transfer()
    transfer.want(CHUNKS)
    transfer.offer("anna", lambda chunk: chunk != CHUNKS[7])
    while ask := transfer.next(0.0):
        transfer.arrived(ask)
    assert transfer.orphan() == CHUNKS[7]
    assert not transfer.idle


def test_sources_agree_or_are_outvoted() -> None:
    right, wrong = (b"a", b"b"), (b"a", b"x")
    assert agree({"anna": right}) == (right, frozenset())
    assert agree({"anna": wrong, "ben": right, "carl": right}) == (right, {"anna"})
    assert agree({"anna": right, "ben": wrong}) == (right, {"ben"})
    assert agree({"ben": wrong, "anna": right}) == (wrong, {"anna"})
    mixed = {"anna": (b"x", b"b"), "ben": right, "carl": (b"a", b"y")}
    assert agree(mixed) == (right, {"anna", "carl"})
