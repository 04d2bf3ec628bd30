"""Dialling back: what is told, and what it cannot be used for."""

from collections.abc import Callable, Sequence

import pytest
import trio
from hypothesis import given
from hypothesis import strategies as st

from pxd.p2p import reach
from pxd.p2p.addresses import parse_address
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.network import CallFailed
from pxd.p2p.reach import (
    BURST,
    DIAL,
    DialBack,
    Dialled,
    Outcome,
    Reach,
    may_dial,
    probe,
    probe_port,
)
from tests.p2p.nodes import Nodes


def serve(network: Libp2pNetwork, addresses_of: Callable[[str], Sequence[str]]) -> Reach:
    service = Reach(network.identity, addresses_of, network.host_of)
    network.serve(DIAL, service.serve)
    return service


async def dialled(asker: Libp2pNetwork, asked: Libp2pNetwork, port: int) -> tuple[Dialled, ...]:
    answer = await asker.call(asked.peer_id, DIAL, DialBack(port), timeout=10)
    return answer.results


async def closed_port() -> int:
    """A port on which nobody listens."""
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    port = listener.socket.getsockname()[1]
    await listener.aclose()
    return int(port)


async def test_a_peer_tells_where_it_gets_through(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    closed = await closed_port()
    elsewhere = f"/ip4/127.0.0.1/tcp/{closed}/p2p/{b.peer_id}"
    serve(a, lambda peer: (*b.addresses(), elsewhere))
    listen, data = b.ports()
    assert str(listen) in b.addresses()[0]
    assert data not in (0, listen)
    assert await dialled(b, a, data) == (
        Dialled(b.addresses()[0], "ok", "ok"),
        Dialled(elsewhere, "refused", "ok"),
    )
    assert [found.data for found in await dialled(b, a, closed)] == ["refused", "refused"]
    assert [found.data for found in await dialled(b, a, 0)] == ["skipped", "skipped"]
    # The probes were connections of their own, and did no harm to the one in use.
    assert a.peers() == {b.peer_id}
    assert b.peers() == {a.peer_id}
    assert not a.refusals()
    assert not b.refusals()


async def test_only_addresses_of_the_asking_node_are_dialled(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    c = await nodes.start(a)
    # What the record says of others, of relays, or nonsense, is no address of b.
    relayed = f"{c.addresses()[0]}/p2p-circuit/p2p/{b.peer_id}"
    told = (*c.addresses(), relayed, "nonsense", *b.addresses())
    serve(a, lambda peer: told if peer == b.peer_id else ())
    assert [found.address for found in await dialled(b, a, 0)] == list(b.addresses())
    with pytest.raises(CallFailed) as refused:
        await dialled(c, a, 0)
    assert refused.value.code == "no-address"


async def test_another_node_at_ones_address(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    there = parse_address(a.addresses()[0])
    wrong = f"/ip4/127.0.0.1/tcp/{there.port}/p2p/{b.peer_id}"
    serve(a, lambda peer: (wrong,))
    assert await dialled(b, a, 0) == (Dialled(wrong, "other", "skipped"),)


async def test_something_else_than_pxd_answers(nodes: Nodes, nursery: trio.Nursery) -> None:
    a = await nodes.start()

    async def http(stream: trio.SocketStream) -> None:
        await stream.receive_some()
        await stream.send_all(b"HTTP/1.1 400 Bad Request\r\n\r\n")

    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    nursery.start_soon(trio.serve_listeners, http, [listener])
    port = listener.socket.getsockname()[1]
    address = parse_address(f"/ip4/127.0.0.1/tcp/{port}/p2p/{a.peer_id}")
    assert await probe(a.identity, address) == "other"
    assert await probe_port("127.0.0.1", port) == "ok"


async def test_a_silent_port_takes_bounded_time(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    a = await nodes.start()
    monkeypatch.setattr(reach, "PROBE_TIMEOUT", 0.2)
    [listener] = await trio.open_tcp_listeners(0, host="127.0.0.1")
    async with listener:
        port = listener.socket.getsockname()[1]
        address = parse_address(f"/ip4/127.0.0.1/tcp/{port}/p2p/{a.peer_id}")
        assert await probe(a.identity, address) == "timeout"


async def test_a_peer_may_not_ask_often(nodes: Nodes, autojump_clock: object) -> None:
    service = Reach(_identity(nodes), lambda peer: (address(peer),), lambda peer: None)
    for _ in range(BURST):
        [found] = (await service.serve(PEER, DialBack(0))).results
        assert found.listen == "skipped"
    with pytest.raises(CallFailed) as refused:
        await service.serve(PEER, DialBack(0))
    assert refused.value.code == "too-often"
    # One peer's haste is not another's.
    await service.serve(OTHER, DialBack(0))
    await trio.sleep(reach.REFILL_SECONDS)
    await service.serve(PEER, DialBack(0))
    with pytest.raises(CallFailed):
        await service.serve(PEER, DialBack(0))


async def test_who_asks_too_often_is_remembered_among_many(
    nodes: Nodes, autojump_clock: object, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reach, "REQUESTERS", 2)
    service = Reach(_identity(nodes), lambda peer: (address(peer),), lambda peer: None)
    for letter in "BCDEFG":
        await service.serve("12D3KooW" + letter * 44, DialBack(0))
    assert len(service._allowance) == 2


async def test_only_so_many_at_once(
    nodes: Nodes, nursery: trio.Nursery, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate, begun = trio.Event(), trio.Event()

    async def wait(*_: object) -> Outcome:
        begun.set()
        await gate.wait()
        return "ok"

    monkeypatch.setattr(reach, "AT_ONCE", 1)
    monkeypatch.setattr(reach, "probe", wait)
    service = Reach(_identity(nodes), lambda peer: (address(peer),), lambda peer: "127.0.0.1")
    nursery.start_soon(service.serve, PEER, DialBack(0))
    await begun.wait()
    with pytest.raises(CallFailed) as refused:
        await service.serve(OTHER, DialBack(0))
    assert refused.value.code == "busy"
    gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert (await service.serve(OTHER, DialBack(0))).results[0].listen == "ok"


PEER, OTHER = "12D3KooW" + "P" * 44, "12D3KooW" + "Q" * 44


def address(peer: str) -> str:
    return f"/ip4/127.0.0.1/tcp/8471/p2p/{peer}"


def _identity(nodes: Nodes) -> reach.Identity:
    return nodes.make().identity


@pytest.mark.parametrize(
    ("host", "loopback", "expected"),
    [
        ("192.168.1.5", False, True),
        ("2001:db8::5", False, True),
        ("fe80::1%eth0", False, True),
        ("127.0.0.1", False, False),
        ("127.0.0.1", True, True),
        ("::1", False, False),
        ("::ffff:127.0.0.1", False, False),
        ("0.0.0.0", True, False),
        ("::", True, False),
        ("224.0.0.251", True, False),
        ("ff02::fb", True, False),
        ("255.255.255.255", True, False),
        ("victim.example", True, False),
    ],
)
def test_what_is_never_dialled(host: str, loopback: bool, expected: bool) -> None:
    assert may_dial(host, loopback=loopback) is expected


async def test_loopback_is_for_those_who_come_from_there(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    async def works(*_: object) -> Outcome:
        return "ok"

    monkeypatch.setattr(reach, "probe", works)
    for host, outcome in (("10.0.0.7", "skipped"), ("127.0.0.1", "ok"), (None, "skipped")):
        service = Reach(_identity(nodes), lambda p: (address(p),), lambda p, host=host: host)
        [found] = (await service.serve(PEER, DialBack(0))).results
        assert found.listen == outcome


@given(st.binary(max_size=200))
def test_garbage_is_no_request(data: bytes) -> None:
    for decoder in (DIAL.request, DIAL.response):
        try:
            decoder.decode(data)
        except reach.msgspec.DecodeError:
            continue
