"""Addresses, the address book, refusals, pending connections, queues, interfaces."""

import logging
from pathlib import Path

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st
from trio.testing import MockClock

from pxd.p2p import addressbook, refusals
from pxd.p2p.addressbook import AddressBook
from pxd.p2p.addresses import Address, parse_address, parse_peer_addresses
from pxd.p2p.casts import DroppingQueue
from pxd.p2p.pending import PendingConnections
from pxd.p2p.refusals import Refusals

PEER = "12D3KooWK99VoVxNE7XzyBwXEzW7xhK7Gpv85r9F3V3fyKSUKPH5"
OTHER = "12D3KooWJWoaqZhDaoEFshF7Rh1bpY9ohihFhzcW6d69Lr2NASuq"


@given(
    st.one_of(st.ip_addresses().map(str), st.just("node-7.example")),
    st.integers(1, 65535),
)
def test_addresses_survive_being_written_down(host: str, port: int) -> None:
    address = Address(host, port, PEER)
    assert parse_address(str(address)) == address


@given(st.text(max_size=200))
def test_other_text_is_no_address(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|has no|ends in"):
        parse_address(text)


@pytest.mark.parametrize(
    "text",
    [
        f"/ip4/::1/tcp/1/p2p/{PEER}",
        f"/ip6/127.0.0.1/tcp/1/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/0/p2p/{PEER}",
        f"/ip4/127.0.0.1/tcp/65536/p2p/{PEER}",
        f"/ip4/127.0.0.1/udp/1/p2p/{PEER}",
        "/ip4/127.0.0.1/tcp/1/p2p/not-a-peer-id",
        f"/ip4/127.0.0.1/tcp/\u0663/p2p/{PEER}",
        f"/dns4/bad host/tcp/1/p2p/{PEER}",
        f"/dns4/{'a' * 64}/tcp/1/p2p/{PEER}",
        f"/dns4/two..dots/tcp/1/p2p/{PEER}",
        f"/dns4/{'.'.join(['a' * 63] * 4)}/tcp/1/p2p/{PEER}",
        f"/ip6/fe80::1%eth0/tcp/1/p2p/{PEER}",
    ],
)
def test_almost_addresses_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"is not|has no|ends in"):
        parse_address(text)


def test_addresses_of_somebody_else_are_dropped() -> None:
    texts = (f"/ip4/192.0.2.1/tcp/1/p2p/{PEER}", f"/ip4/192.0.2.1/tcp/1/p2p/{OTHER}", "?")
    assert parse_peer_addresses(PEER, texts) == [Address("192.0.2.1", 1, PEER)]


def test_names_are_not_taken_from_peers() -> None:
    texts = (f"/dns4/home.example/tcp/1/p2p/{PEER}", f"/ip6/2001:db8::1/tcp/1/p2p/{PEER}")
    assert parse_peer_addresses(PEER, texts) == [Address("2001:db8::1", 1, PEER)]
    assert len(parse_peer_addresses(PEER, texts, names=True)) == 2


def test_the_book_keeps_what_works_first_and_remembers_it(tmp_path: Path) -> None:
    now = 1e9
    book = AddressBook(tmp_path / "peers.json", clock=lambda: now)
    book.load()
    told = tuple(Address("192.0.2.1", port, PEER) for port in range(1, 50))
    book.learn(PEER, told)
    assert len(book.addresses(PEER)) == addressbook.ADDRESSES_PER_PEER
    book.worked(told[7])
    book.learn(PEER, told[:3])
    assert book.addresses(PEER) == (told[7], *told[:3])
    book.learn(OTHER, (Address("192.0.2.2", 1, OTHER),))
    assert book.changed
    book.save(book.snapshot())
    assert not book.changed
    assert (tmp_path / "peers.json").stat().st_mode & 0o777 == 0o600

    again = AddressBook(tmp_path / "peers.json", clock=lambda: now + 86400)
    again.load()
    assert again.remembered() == (PEER,)
    assert again.addresses(PEER) == (told[7], *told[:3])
    much_later = AddressBook(tmp_path / "peers.json", clock=lambda: now + 40 * 86400)
    much_later.load()
    assert much_later.remembered() == ()


def test_the_book_keeps_no_zone_and_knows_news_when_it_hears_them() -> None:
    book = AddressBook(Path("/nonexistent/peers.json"))
    here, there = Address("fe80::1", 1, PEER), Address("192.0.2.1", 1, PEER)
    assert book.learn(PEER, (here, there))
    book.worked(here._replace(host="fe80::1%eth0"))
    assert book.addresses(PEER) == (here, there)
    assert not book.learn(PEER, (there, here))
    # What worked is kept although the peer no longer tells of it, and yet comes back as news.
    assert book.learn(PEER, (there,))
    assert book.addresses(PEER) == (here, there)
    assert book.learn(PEER, (here, there))
    assert not book.learn(OTHER, ())


def test_the_book_is_bounded() -> None:
    book = AddressBook(Path("/nonexistent/peers.json"))
    for number in range(addressbook.PEERS + 100):
        peer = f"peer{number}"
        book.learn(peer, (Address("192.0.2.1", 1, peer),))
        book.seen(peer)
    assert len(book.remembered()) == addressbook.PEERS
    assert not book.addresses("peer0")


def test_peers_without_an_address_are_not_remembered_for_ever() -> None:
    book = AddressBook(Path("/nonexistent/peers.json"))
    peers = [f"peer{number}" for number in range(3 * addressbook.PEERS)]
    for peer in peers:
        book.seen(peer)
    assert book.remembered() == tuple(peers[-addressbook.PEERS :])


def test_a_damaged_file_is_reported_and_ignored(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "peers.json"
    path.write_bytes(b'[{"peer": 3}]')
    book = AddressBook(path)
    with caplog.at_level(logging.WARNING, "pxd.p2p"):
        book.load()
    assert str(path) in caplog.text
    assert book.remembered() == ()


def test_refusals_are_bounded_and_not_logged_again_and_again(
    caplog: pytest.LogCaptureFixture,
) -> None:
    now = 0.0
    refused = Refusals(clock=lambda: now)
    with caplog.at_level(logging.WARNING, "pxd.p2p"):
        for number in range(1000):
            refused.warn("192.0.2.1", f"peer{number}", "wrong-key", "go away")
        assert len(caplog.records) == 1
        refused.warn("192.0.2.2", "peer", "wrong-key", "go away")
        refused.warn("192.0.2.1", "peer", "version", "too old")
        now += refusals.QUIET_SECONDS
        refused.warn("192.0.2.1", "peer", "wrong-key", "go away")
        assert len(caplog.records) == 4
    latest = refused.latest()
    assert len(latest) == refusals.CAPACITY
    assert latest[-1].reason == "wrong-key"
    refused.forget("peer")
    assert "peer" not in {refusal.peer for refusal in refused.latest()}


async def test_pending_connections_give_up_the_oldest_of_the_busiest(
    nursery: trio.Nursery, autojump_clock: MockClock
) -> None:
    pending = PendingConnections(per_address=3, total=5)
    ended: list[str] = []

    async def connect(address: str, name: str) -> None:
        with pending.admit(address, within=10):
            await trio.sleep_forever()
        ended.append(name)

    for name in ("a1", "a2", "a3", "a4", "b1", "b2", "c1"):
        nursery.start_soon(connect, name[0], name)
        await trio.testing.wait_all_tasks_blocked()
    assert ended == ["a1", "a2"]
    assert len(pending) == 5
    await trio.sleep(11)
    assert len(pending) == 0


@given(st.lists(st.integers(0, 50), max_size=60))
def test_the_dropping_queue_keeps_the_newest(sizes: list[int]) -> None:
    queue: DroppingQueue[int] = DroppingQueue(capacity=10, max_bytes=100)
    for number, size in enumerate(sizes):
        queue.put(number, size)
    kept = [queue.get_nowait() for _ in range(len(queue))]
    assert kept == list(range(len(sizes) - len(kept), len(sizes)))
    assert len(kept) <= 10
    assert sum(sizes[number] for number in kept) <= 100
    dropped = len(sizes) - len(kept)
    if dropped and len(kept) < 10:
        assert sum(sizes[dropped - 1 :]) > 100


def test_a_node_knows_whether_it_ever_met_another(tmp_path: Path) -> None:
    path = tmp_path / "peers.json"
    assert not addressbook.has_met_others(path)
    book = AddressBook(path)
    book.learn(PEER, (Address("192.0.2.1", 1, PEER),))
    book.save(book.snapshot())
    assert not addressbook.has_met_others(path), "heard of is not met"
    book.seen(PEER)
    book.save(book.snapshot())
    assert addressbook.has_met_others(path)
    path.write_bytes(b"\xff")
    assert addressbook.has_met_others(path), "better safe than sorry"
