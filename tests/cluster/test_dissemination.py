import math

import msgspec

from pxd.cluster.dissemination import BroadcastQueue
from pxd.cluster.messages import MAX_MESSAGE, Claim, SignedRecord
from pxd.cluster.records import NodeRecord, StageReport
from tests.signers import signed


def record(node: str, version: int = 0, padding: int = 0) -> SignedRecord:
    stages = tuple(
        StageReport(model="m", pipeline="p", start=0, end=1, state="failed", reason="x" * 1800)
        for _ in range(padding // 2000)
    )
    return signed(NodeRecord(id=node, name=node, incarnation=1, version=version, stages=stages))


def others(count: int) -> list[str]:
    return [f"peer{i}" for i in range(count)]


def test_news_goes_to_as_many_peers_as_the_cluster_size_asks() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("a"))
    told = [peer for peer in others(99) if queue.take(peer, others(99)).records]
    assert len(told) == 4 * math.ceil(math.log10(101))
    assert not queue


def test_in_a_small_cluster_everybody_is_told_once() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("a"), "peer0")
    assert not queue.take("peer0", others(3)).records
    assert queue.take("peer1", others(3)).records
    assert not queue.take("peer1", others(3)).records
    assert queue.take("peer2", others(3)).records
    assert not queue


def test_the_owner_is_not_told_its_own_record() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("peer0"))
    assert not queue.take("peer0", others(9)).records


def test_newer_news_of_a_node_replaces_older() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("a", 1))
    queue.push_record(record("a", 2))
    queue.push_claim(Claim("a", "suspect", 1, "x"))
    queue.push_claim(Claim("a", "suspect", 1, "y"))
    news = queue.take("peer0", others(9))
    assert news.records == (record("a", 2),)
    assert news.claims == (Claim("a", "suspect", 1, "y"),)


def test_a_new_life_makes_claims_about_the_old_one_void() -> None:
    queue = BroadcastQueue(4)
    queue.push_claim(Claim("a", "suspect", 0, "x"))
    queue.push_record(record("a"))
    assert not queue.take("peer0", others(9)).claims


def test_what_does_not_fit_waits() -> None:
    queue = BroadcastQueue(4)
    for name in "abc":
        queue.push_record(record(name, padding=30_000))
    told: list[str] = []
    for peer in others(2):
        news = queue.take(peer, others(9))
        assert len(msgspec.msgpack.encode(news)) <= MAX_MESSAGE
        told += [r.node for r in news.records]
    assert set(told) == {"a", "b", "c"}


def test_the_least_told_comes_first() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("old", padding=30_000))
    queue.push_record(record("older", padding=30_000))
    assert [r.node for r in queue.take("peer0", others(9)).records] == ["older", "old"]
    queue.push_record(record("new", padding=30_000))
    assert [r.node for r in queue.take("peer1", others(9), 40_000).records] == ["new"]


def test_a_dropped_node_is_no_news() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("a"))
    queue.push_claim(Claim("a", "left", 1, "a"))
    queue.discard("a")
    assert not queue


def test_however_much_waits_it_is_all_told_in_the_end() -> None:
    queue = BroadcastQueue(4)
    for index in range(3000):
        queue.push_record(record(f"n{index}"), "source")
    told: set[str] = set()
    for step in range(3000):
        news = queue.take(f"peer{step}", others(9999))
        assert len(msgspec.msgpack.encode(news)) <= MAX_MESSAGE
        told |= {r.node for r in news.records}
        if not queue:
            break
    assert len(told) == 3000
    assert not queue


def test_news_that_all_have_is_none() -> None:
    queue = BroadcastQueue(4)
    queue.push_record(record("a"), *others(3))
    queue.push_claim(Claim("b", "suspect", 1, "x"), *others(3))
    assert not queue.take("peer1", others(3)).records
    assert not queue
