"""The router of one ingress, under any order of events."""

from collections import Counter
from collections.abc import Iterable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from msgspec.structs import replace

from pxd.engine.hashing import BlockHashes
from pxd.planning.routing.breaker import FAILURES_TO_OPEN, PAUSES_S, Circuit
from pxd.planning.routing.prefixes import LONGEST_PREFIX, PrefixMemory
from pxd.planning.routing.rendezvous import rendezvous
from pxd.planning.routing.replicas import PoolOverloaded, Replica, replica_in
from pxd.planning.routing.router import (
    BLOCKS_PER_PLACE,
    GUESS_SLACK,
    SESSION_SLACK,
    Candidate,
    Router,
    Wish,
)

NAMES = ("p", "q", "r")


def candidate(name: str, load: int = 0, tier: int = 0, **more: object) -> Candidate:
    healthy = bool(more.pop("healthy", True))
    replica = replica_in(tier, name, healthy=healthy, queue_depth=load)
    return Candidate(replica=replica, told=(load,), **more)  # type: ignore[arg-type]


def pool(**loads: int) -> list[Candidate]:
    return [candidate(name, loads.get(name, 0)) for name in NAMES]


def prefix(text: Iterable[int], blocks: int) -> list[bytes]:
    return BlockHashes(b"m", 1).of(list(text), blocks)


def choose(router: Router, candidates: list[Candidate], now: float = 0.0, **wish: object) -> str:
    """And the request has ended at once."""
    chosen = router.choose(candidates, Wish(**wish), now)  # type: ignore[arg-type]
    router.ended(chosen)
    return chosen


def open_circuit(router: Router, name: str, now: float) -> None:
    for _ in range(FAILURES_TO_OPEN):
        router.failed(name, now, now)


# Sessions.


def test_a_session_stays_where_it_is() -> None:
    router = Router()
    own = rendezvous("s", NAMES)
    for load in range(SESSION_SLACK + 1):
        assert choose(router, pool(**{own: load}), session="s") == own


def test_a_session_leaves_an_overloaded_pipeline_and_comes_back() -> None:
    router = Router()
    own = rendezvous("s", NAMES)
    second = rendezvous("s", [name for name in NAMES if name != own])
    assert choose(router, pool(**{own: SESSION_SLACK + 1}), session="s") == second
    tight = [candidate(name, tier=2 if name == own else 0) for name in NAMES]
    assert choose(router, tight, session="s") == second
    assert choose(router, pool(), session="s") == own


def test_all_ingresses_agree_on_a_session() -> None:
    sessions = [str(number) for number in range(50)]
    chosen = [[choose(router, pool(), session=s) for s in sessions] for router in (Router(),) * 2]
    assert chosen[0] == chosen[1]
    assert set(chosen[0]) == set(NAMES)


# Prefixes.


def test_a_conversation_goes_on_where_its_cache_is() -> None:
    router = Router()
    first = prefix(range(100), 10)
    router.remember(first, "q")
    assert choose(router, pool(q=1), prefix=prefix(range(100), 20)) == "q"


def test_the_longest_known_beginning_counts() -> None:
    router = Router()
    router.remember(prefix(range(100), 20), "q")
    router.remember(prefix(range(100), 8), "r")  # others with the same system prompt
    assert choose(router, pool(), prefix=prefix(range(100), 30)) == "q"
    assert choose(router, pool(), prefix=prefix([*range(8), 0, 0, 0], 11)) == "r"


def test_the_longer_the_beginning_the_longer_it_is_waited_for() -> None:
    router = Router()
    long, short = prefix(range(900), 4 * BLOCKS_PER_PLACE), prefix(range(50, 90), 2)
    for known in (long, short):
        router.remember(known, "q")
    assert choose(router, pool(q=4), prefix=long) == "q"
    assert choose(router, pool(q=5), prefix=long) != "q"
    assert choose(router, pool(q=GUESS_SLACK + 1), prefix=short) != "q"


def test_ingresses_that_know_nothing_guess_the_same() -> None:
    guesses = Counter()
    for number in range(60):
        names = prefix([number] * 9, 9)
        assert choose(Router(), pool(), prefix=names) == choose(Router(), pool(), prefix=names)
        guesses[choose(Router(), pool(), prefix=names)] += 1
    assert set(guesses) == set(NAMES)


def test_a_pipeline_that_keeps_no_prefixes_is_not_sought_for_one() -> None:
    router = Router()
    router.remember(prefix(range(100), 50), "q")
    candidates = [replace(one, caches=one.id != "q") for one in pool(p=2, q=2, r=0)]
    assert choose(router, candidates, prefix=prefix(range(100), 50)) == "r"
    nobody = [replace(one, caches=False) for one in pool(p=2, q=1, r=2)]
    assert choose(router, nobody, prefix=prefix(range(100), 50)) == "q"


@given(
    st.lists(st.tuples(st.lists(st.integers(0, 2), max_size=12), st.sampled_from(NAMES))),
    st.integers(1, 20),
)
def test_the_memory_is_bounded_and_forgets_ends_first(
    served: list[tuple[list[int], str]], limit: int
) -> None:
    memory = PrefixMemory(limit)
    for tokens, home in served:
        names = prefix(tokens, len(tokens))
        memory.remember(names, home)
        assert len(memory) <= limit
        found = list(memory.find(names))
        # What is left of the latest is a whole beginning of it.
        assert found == [(length, home) for length in range(min(len(names), limit), 0, -1)]


def test_one_endless_prompt_does_not_push_out_all_others() -> None:
    memory = PrefixMemory(LONGEST_PREFIX + 1)
    memory.remember([b"other"], "q")
    memory.remember(prefix([0] * 5000, 5000), "p")
    assert list(memory.find([b"other"])) == [(1, "q")]


# Circuits.


def test_a_circuit_opens_and_lets_one_probe_through_after_a_pause() -> None:
    router = Router()
    open_circuit(router, "p", 10.0)
    busy = pool(q=5, r=5)
    assert choose(router, busy, 10.0 + PAUSES_S[0] / 2) != "p"
    later = 10.0 + PAUSES_S[0]
    assert choose(router, busy, later) == "p"
    assert choose(router, busy, later) != "p", "one probe at a time"
    router.failed("p", later, later + 0.5)
    assert choose(router, busy, later + 0.5 + PAUSES_S[0]) != "p", "the next pause is longer"
    later += 0.5 + PAUSES_S[1]
    assert choose(router, busy, later) == "p"
    router.succeeded("p", later - 20)
    assert choose(router, busy, later) != "p", "that one was sent before it failed"
    router.succeeded("p", later)
    assert [choose(router, busy, later) for _ in range(5)] == ["p"] * 5


def test_a_probe_that_nobody_hears_of_again_blocks_nothing() -> None:
    router = Router()
    open_circuit(router, "p", 0.0)
    busy = pool(q=5, r=5)
    assert choose(router, busy, PAUSES_S[0]) == "p"
    assert choose(router, busy, 2 * PAUSES_S[0]) == "p"


def test_what_many_lose_at_once_is_one_failure() -> None:
    circuit = Circuit()
    for number in range(50):
        circuit.failed(number / 100, 1.0 + number / 100)
    assert circuit.state(2.0) == "closed"


def test_with_all_circuits_open_requests_are_served_all_the_same() -> None:
    router = Router()
    for name in NAMES:
        open_circuit(router, name, 0.0)
    assert choose(router, pool(p=1, r=1), 0.1) == "q"


def test_without_a_healthy_pipeline_there_is_none() -> None:
    with pytest.raises(PoolOverloaded):
        choose(Router(), [candidate("p", healthy=False)])
    with pytest.raises(PoolOverloaded):
        choose(Router(), [])


# Any order of events.


@given(st.integers(1, 5), st.integers(10, 60), st.booleans())
def test_no_pipeline_starves(pipelines: int, requests: int, alike: bool) -> None:
    """Requests that stay are shared out, even if all begin alike and no head says a word."""
    router = Router()
    candidates = [candidate(str(number)) for number in range(pipelines)]
    counts: Counter[str] = Counter()
    for number in range(requests):
        names = prefix([0 if alike else number] * 3, 3)
        counts[router.choose(candidates, Wish(prefix=names), 0.0)] += 1
    least, most = min(counts[each.id] for each in candidates), max(counts.values())
    assert most - least - least // 4 <= GUESS_SLACK + 1


class RouterMachine(RuleBasedStateMachine):
    """Requests come, end, fail and succeed while pipelines come and go."""

    def __init__(self) -> None:
        super().__init__()
        self.router = Router()
        self.now = 0.0
        self.listed = {name: candidate(name) for name in NAMES}
        self.flying: list[tuple[str, float]] = []
        self.sessions: dict[str, str] = {}

    @rule(seconds=st.sampled_from([0.1, 1.0, 10.0]))
    def time_passes(self, seconds: float) -> None:
        self.now += seconds

    @rule(
        name=st.sampled_from([*NAMES, "s", "t"]),
        load=st.integers(0, 30),
        tier=st.integers(0, 3),
        healthy=st.booleans(),
        shaky=st.booleans(),
    )
    def a_head_speaks(self, name: str, **said: object) -> None:
        self.listed[name] = candidate(name, **said)  # type: ignore[arg-type]

    @rule(name=st.sampled_from(NAMES))
    def the_plan_drops(self, name: str) -> None:
        self.listed.pop(name, None)

    @rule(
        session=st.sampled_from(["", "1", "2"]),
        tokens=st.lists(st.integers(0, 1), max_size=6),
        failures=st.dictionaries(st.sampled_from(NAMES), st.integers(1, 3)),
    )
    def somebody_asks(self, session: str, tokens: list[int], failures: dict[str, int]) -> None:
        candidates = list(self.listed.values())
        names = prefix(tokens, len(tokens))
        wish = Wish(session=session, prefix=names, failures=failures)
        healthy = {each.id for each in candidates if each.replica.healthy}
        closed = {name for name in healthy if self.router.circuit(name, self.now) != "open"}
        if not healthy:
            with pytest.raises(PoolOverloaded):
                self.router.choose(candidates, wish, self.now)
            return
        chosen = self.router.choose(candidates, wish, self.now)
        assert chosen in (closed or healthy)
        states = {
            name: (self.listed[name].shaky, failures.get(name, 0)) for name in closed or healthy
        }
        assert states[chosen] == min(states.values())
        self.flying.append((chosen, self.now))
        self.router.remember(names, chosen)

    @precondition(lambda self: self.flying)
    @rule(which=st.integers(0, 99), how=st.sampled_from(["failed", "succeeded", "left"]))
    def one_ends(self, which: int, how: str) -> None:
        name, began = self.flying.pop(which % len(self.flying))
        if how == "failed":
            self.router.failed(name, began, self.now)
        elif how == "succeeded":
            self.router.succeeded(name, began)
        self.router.ended(name)

    @invariant()
    def nothing_is_kept_of_what_is_gone(self) -> None:
        router = self.router
        assert +router._held == Counter(name for name, _ in self.flying)
        router._follow(list(self.listed.values()))
        for kept in (router._circuits, router._told, router._pool.served):
            assert set(kept) <= set(self.listed)


TestRouterMachine = RouterMachine.TestCase


@given(
    st.lists(st.integers(0, SESSION_SLACK), min_size=3, max_size=3),
    st.text(min_size=1),
    st.lists(st.sampled_from(["come", "go"]), max_size=20),
)
def test_a_session_is_sticky_while_its_pipeline_is_well(
    loads: list[int], session: str, events: list[str]
) -> None:
    router = Router()
    candidates = pool(**dict(zip(NAMES, loads, strict=True)))
    own = choose(router, candidates, session=session)
    for event in events:
        others = [each for each in candidates if each.id == own or event == "come"]
        assert choose(router, others, session=session) == own
    sick = [replace(each, shaky=each.id == own) for each in candidates]
    assert choose(router, sick, session=session) != own


def test_a_replica_that_tells_only_its_tier_is_in_it() -> None:
    assert replica_in(3, "p", healthy=True, queue_depth=2) == Replica(
        id="p", queue_depth=2, free_blocks=50, total_blocks=1000
    )
