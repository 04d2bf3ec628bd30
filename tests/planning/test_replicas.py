import random
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.planning.routing.rendezvous import rendezvous
from pxd.planning.routing.replicas import (
    PoolOverloaded,
    PoolTotals,
    Replica,
    ReplicaPool,
    ReplicaStrategy,
    pool_totals,
    pressure_tier,
)

STRATEGIES: list[ReplicaStrategy] = ["round_robin", "least_loaded", "sticky"]


def replica(
    name: str, *, blocks: tuple[int, int] = (0, 0), queue_depth: int = 0, free_bytes: int = 0
) -> Replica:
    """`blocks` is (free, total)."""
    free, total = blocks
    return Replica(
        id=name,
        queue_depth=queue_depth,
        free_blocks=free,
        total_blocks=total,
        free_bytes=free_bytes,
    )


def three() -> list[Replica]:
    return [replica(name) for name in "abc"]


def first_by_load(replicas: list[Replica]) -> str:
    return ReplicaPool().attempt(replicas, "least_loaded").replica


def dead(name: str) -> Replica:
    return Replica(id=name, healthy=False)


# The examples of the reference.


def test_the_shortest_queue_is_chosen() -> None:
    depths = [(10, 5), (2, 1), (5, 3)]
    replicas = [replica(n, queue_depth=sum(d)) for n, d in zip("abc", depths, strict=True)]
    assert first_by_load(replicas) == "b"


@pytest.mark.parametrize("strategy", ["round_robin", "least_loaded"])
def test_nine_requests_over_three_replicas_are_three_each(strategy: ReplicaStrategy) -> None:
    pool = ReplicaPool()
    for _ in range(9):
        pool.attempt(three(), strategy)
    assert pool.served == {"a": 3, "b": 3, "c": 3}


def test_a_session_stays_on_one_replica() -> None:
    pool = ReplicaPool()
    chosen = {pool.attempt(three(), "sticky", session="s").replica for _ in range(5)}
    assert len(chosen) == 1
    assert pool.served[chosen.pop()] == 5


def test_kv_pressure_counts_before_the_queue() -> None:
    full = replica("a", blocks=(4, 100), queue_depth=0)
    roomy = replica("b", blocks=(32, 100), queue_depth=1)
    assert first_by_load([full, roomy]) == "b"


def test_fail_over_goes_to_the_replica_with_most_room() -> None:
    pool = ReplicaPool()
    attempt = pool.attempt(three(), "round_robin")
    assert attempt.replica == "a"
    now = [dead("a"), replica("b", blocks=(8, 100)), replica("c", blocks=(40, 100))]
    assert attempt.failed(RuntimeError(), now) == "c"
    assert pool.attempt(now, "least_loaded").replica == "c"


# The key.


@pytest.mark.parametrize(
    ("used", "tier"),
    [(0, 0), (699, 0), (700, 1), (849, 1), (850, 2), (949, 2), (950, 3), (1000, 3)],
)
def test_pressure_tiers(used: int, tier: int) -> None:
    assert pressure_tier(replica("a", blocks=(1000 - used, 1000))) == tier


def test_thousandths_in_use_are_rounded_down() -> None:
    assert pressure_tier(replica("a", blocks=(901, 3001))) == 0  # 699.77 thousandths


def test_without_figures_a_replica_is_in_the_worst_tier_where_others_have_some() -> None:
    silent = replica("a", queue_depth=0)
    busy = replica("b", blocks=(5, 100), queue_depth=9)
    assert first_by_load([silent, busy]) == "a"  # both in the worst tier
    assert first_by_load([silent, replica("b", blocks=(6, 100), queue_depth=9)]) == "b"


def test_figures_of_an_unhealthy_replica_do_not_count() -> None:
    gone = Replica(id="c", healthy=False, free_blocks=90, total_blocks=100)
    assert first_by_load([replica("a", queue_depth=2), replica("b", queue_depth=1), gone]) == "b"


@pytest.mark.parametrize(
    ("worse", "better"),
    [
        (replica("a", blocks=(299, 1000)), replica("b", blocks=(301, 1000), queue_depth=99)),
        (replica("a", queue_depth=1, free_bytes=9), replica("b")),
        (replica("a", blocks=(50, 100), free_bytes=9), replica("b", blocks=(51, 100))),
        (replica("a", free_bytes=8), replica("b", free_bytes=9)),
    ],
    ids=["tier", "queue", "free blocks", "free bytes"],
)
def test_the_parts_of_the_key_in_their_order(worse: Replica, better: Replica) -> None:
    assert first_by_load([worse, better]) == better.id
    pool = ReplicaPool()
    pool.attempt([worse, better], "least_loaded")
    assert pool.attempt([worse, better], "least_loaded").replica == better.id


def test_ties_go_to_who_served_least_and_then_to_the_first() -> None:
    pool = ReplicaPool()
    chosen = [pool.attempt(three(), "least_loaded").replica for _ in range(4)]
    assert chosen == ["a", "b", "c", "a"]


figures = st.builds(
    Replica,
    id=st.text("abcdef", min_size=1),
    healthy=st.booleans(),
    queue_depth=st.integers(0, 3),
    free_blocks=st.integers(0, 20),
    total_blocks=st.sampled_from([0, 20]),
    free_bytes=st.integers(0, 2),
)
pools = st.lists(figures, max_size=6, unique_by=lambda replica: replica.id)


@given(pools, st.lists(st.integers(0, 5)))
def test_least_loaded_has_the_smallest_key(replicas: list[Replica], earlier: list[int]) -> None:
    pool = ReplicaPool()
    for place in earlier:
        if place < len(replicas) and replicas[place].healthy:
            pool.attempt(replicas, "sticky", session=str(place))
    healthy = [one for one in replicas if one.healthy]
    anyone_knows = any(one.total_blocks for one in healthy)
    served = pool.served

    def key(one: Replica) -> tuple[int, ...]:
        tier = 3 if anyone_knows else 0
        if one.total_blocks:
            used = (one.total_blocks - one.free_blocks) * 1000 // one.total_blocks
            tier = (used >= 700) + (used >= 850) + (used >= 950)
        return (tier, one.queue_depth, -one.free_blocks, -one.free_bytes, served.get(one.id, 0))

    assert pool.by_load(replicas) == [one.id for one in sorted(healthy, key=key)]
    if healthy:
        assert pool.attempt(replicas, "least_loaded").replica == min(healthy, key=key).id


# Health.


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_an_empty_pool_is_overloaded(strategy: ReplicaStrategy) -> None:
    with pytest.raises(PoolOverloaded, match="no replica in the pool"):
        ReplicaPool().attempt([], strategy, session="s")
    with pytest.raises(PoolOverloaded, match="no healthy replica"):
        ReplicaPool().attempt([dead("a")], strategy, session="s")


@pytest.mark.parametrize("strategy", STRATEGIES)
@given(pools, st.integers(0, 9))
def test_no_strategy_chooses_an_unhealthy_replica(
    strategy: ReplicaStrategy, replicas: list[Replica], session: int
) -> None:
    healthy = {one.id for one in replicas if one.healthy}
    pool = ReplicaPool()
    for _ in range(3 if healthy else 0):
        assert pool.attempt(replicas, strategy, session=str(session)).replica in healthy


def test_round_robin_shares_equally_past_unhealthy_replicas() -> None:
    pool = ReplicaPool()
    replicas = [replica("a"), dead("b"), replica("c"), dead("d")]
    assert [pool.attempt(replicas, "round_robin").replica for _ in range(4)] == list("acac")


def test_round_robin_goes_on_when_the_pool_shrinks() -> None:
    pool = ReplicaPool()
    for _ in range(3):
        pool.attempt(three(), "round_robin")
    assert pool.attempt([replica("b")], "round_robin").replica == "b"
    assert pool.served == {"b": 2}


def test_sticky_without_a_session_is_round_robin() -> None:
    pool = ReplicaPool()
    assert [pool.attempt(three(), "sticky").replica for _ in range(4)] == list("abca")


# Fail-over.


class Broken(Exception):
    pass


def test_a_unary_request_ends_with_the_original_error_when_all_fail() -> None:
    attempt = ReplicaPool().attempt(three(), "least_loaded")
    first = Broken("first")
    assert attempt.failed(first, three()) == "b"
    assert attempt.failed(Broken("second"), three()) == "c"
    with pytest.raises(Broken, match="first") as raised:
        attempt.failed(Broken("third"), three())
    assert raised.value is first


def test_a_stream_ends_as_overloaded_when_all_fail() -> None:
    attempt = ReplicaPool().attempt(three(), "least_loaded", streaming=True)
    attempt.failed(Broken("first"), three())
    attempt.failed(Broken("second"), three())
    with pytest.raises(PoolOverloaded, match=r"^all replicas failed or overloaded$") as raised:
        attempt.failed(Broken("third"), three())
    assert str(raised.value.__cause__) == "first"


@pytest.mark.parametrize("streaming", [False, True])
def test_a_fault_of_the_client_is_told_to_it_at_once(streaming: bool) -> None:
    attempt = ReplicaPool().attempt(three(), "least_loaded", streaming=streaming)
    attempt.failed(Broken("first"), three())
    with pytest.raises(ValueError, match="unknown field"):
        attempt.failed(ValueError("unknown field"), three(), client_fault=True)


def test_health_is_looked_at_again_before_every_try() -> None:
    attempt = ReplicaPool().attempt(three(), "least_loaded")
    assert attempt.failed(Broken(), [replica("a"), dead("b"), replica("c")]) == "c"
    assert attempt.failed(Broken(), three()) == "b"  # has come back


def test_fail_over_counts_on_success_only() -> None:
    pool = ReplicaPool()
    attempt = pool.attempt(three(), "least_loaded")
    assert pool.served == {"a": 1, "b": 0, "c": 0}
    attempt.failed(Broken(), three())
    attempt.failed(Broken(), three())
    assert pool.served == {"a": 1, "b": 0, "c": 0}
    attempt.succeeded()
    assert pool.served == {"a": 1, "b": 0, "c": 1}


def test_success_at_once_counts_once() -> None:
    pool = ReplicaPool()
    pool.attempt(three(), "round_robin").succeeded()
    assert pool.served == {"a": 1, "b": 0, "c": 0}


def test_a_replica_that_has_left_is_not_counted_again() -> None:
    pool = ReplicaPool()
    attempt = pool.attempt(three(), "least_loaded")
    attempt.failed(Broken(), three())
    pool.attempt([replica("c")], "least_loaded")
    attempt.succeeded()
    assert pool.served == {"c": 1}


@given(pools.filter(lambda pool: any(one.healthy for one in pool)), st.sampled_from(STRATEGIES))
def test_fail_over_tries_every_healthy_replica_once_in_key_order(
    replicas: list[Replica], strategy: ReplicaStrategy
) -> None:
    pool = ReplicaPool()
    attempt = pool.attempt(replicas, strategy, session="s")
    first = attempt.replica
    for expected in [name for name in pool.by_load(replicas) if name != first]:
        assert attempt.failed(Broken(), replicas) == expected
    with pytest.raises(Broken):
        attempt.failed(Broken(), replicas)


# Aggregates.


def test_a_pool_sums_up_its_replicas() -> None:
    one = Replica(
        id="a",
        queue_depth=15,
        free_blocks=4,
        total_blocks=100,
        free_bytes=7,
        memory_bytes=10,
        tokens_per_s=1.5,
        utilisation=0.5,
    )
    other = Replica(
        id="b",
        healthy=False,
        queue_depth=3,
        free_blocks=1,
        total_blocks=50,
        free_bytes=1,
        memory_bytes=20,
        tokens_per_s=2.0,
        utilisation=1.0,
    )
    assert pool_totals([one, other]) == PoolTotals(
        healthy=True,
        queue_depth=18,
        free_blocks=5,
        total_blocks=150,
        free_bytes=8,
        memory_bytes=30,
        tokens_per_s=3.5,
        utilisation=0.75,
    )
    assert not pool_totals([other]).healthy
    assert pool_totals([]) == PoolTotals(False, 0, 0, 0, 0, 0, 0.0, 0.0)


# Rendezvous hashing.

members = st.lists(st.text(max_size=3), min_size=1, max_size=8, unique=True)
keys = st.lists(st.text(), min_size=1, max_size=20)


@given(keys, members, st.text(min_size=4))
def test_a_member_that_joins_takes_keys_for_itself_only(
    keys: list[str], members: list[str], newcomer: str
) -> None:
    """And read the other way: one that leaves moves its own keys only."""
    for key in keys:
        assert rendezvous(key, [*members, newcomer]) in {rendezvous(key, members), newcomer}


@given(st.text(), members, st.randoms(use_true_random=False))
def test_the_order_of_members_does_not_matter(
    key: str, members: list[str], shuffler: random.Random
) -> None:
    shuffled = list(members)
    shuffler.shuffle(shuffled)
    assert rendezvous(key, shuffled) == rendezvous(key, members)


def test_keys_spread_evenly_and_few_move() -> None:
    sessions = [f"session-{i}" for i in range(4000)]
    four, five = ["a", "b", "c", "d"], ["a", "b", "c", "d", "e"]
    shares = Counter(rendezvous(session, four) for session in sessions)
    assert all(abs(shares[member] - 1000) < 100 for member in four)
    moved = sum(rendezvous(s, four) != rendezvous(s, five) for s in sessions)
    assert abs(moved - 800) < 100


def test_the_choice_is_the_same_in_every_process_and_release() -> None:
    chosen = "".join(rendezvous(f"session-{i}", list("abc")) for i in range(12))
    assert chosen == "bbbcabaaccca"


def test_any_text_is_a_key() -> None:
    assert rendezvous("\ud800 not utf-8", ["a"]) == "a"


def test_where_the_key_ends_and_the_member_starts_counts() -> None:
    whole = [rendezvous(f"{i}1", ["x", "y"]) for i in range(20)]
    assert whole != [rendezvous(f"{i}", ["1x", "1y"])[1] for i in range(20)]
