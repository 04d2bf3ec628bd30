"""Real hosts on loopback: connecting, proving the key, losing and finding each other."""

import logging

import pytest
import trio

from pxd.p2p import sessions
from pxd.p2p.network import PeerUnreachable
from tests.p2p.nodes import ECHO, Nodes, Text, connected, eventually


async def test_members_connect_and_call_each_other(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    assert await a.call(b.peer_id, ECHO, Text("to b"), timeout=5) == Text("to b")
    assert await b.call(a.peer_id, ECHO, Text("to a"), timeout=5) == Text("to a")
    assert await a.call(a.peer_id, ECHO, Text("to me"), timeout=5) == Text("to me")
    assert all(address.endswith(f"/p2p/{a.peer_id}") for address in a.addresses())


async def test_a_wrong_key_gets_nothing_and_both_sides_say_why(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    a = await nodes.start()
    seen: list[tuple[str, bool]] = []
    a.on_peer(lambda peer, up: seen.append((peer, up)))
    with caplog.at_level(logging.INFO, "pxd.p2p"):
        stranger = await nodes.run(nodes.make(a, key=b"x" * 32))
        await eventually(lambda: bool(stranger.refusals() and a.refusals()))
    assert {refusal.reason for refusal in (*a.refusals(), *stranger.refusals())} == {"wrong-key"}
    with pytest.raises(PeerUnreachable):
        await stranger.call(a.peer_id, ECHO, Text("let me in"), timeout=5)
    assert not seen
    assert not a.peers()
    assert not stranger.peers()
    warnings = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert any(
        "refused 127.0.0.1" in w and "does not hold this cluster's key" in w for w in warnings
    )
    assert any("refused by 127.0.0.1" in w and "pxd ticket" in w for w in warnings)


async def test_an_unreachable_member_is_reported_with_the_reason(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    a = await nodes.start()
    await nodes.stop(a)
    b = nodes.make(f"/ip4/127.0.0.1/tcp/1/p2p/{a.peer_id}")
    with caplog.at_level(logging.INFO, "pxd.p2p"):
        await nodes.run(b)
        await eventually(lambda: "connection refused" in caplog.text)
    assert "still trying" in caplog.text
    assert [refusal.address for refusal in b.refusals()] == ["127.0.0.1:1"]
    with pytest.raises(PeerUnreachable):
        await b.call(a.peer_id, ECHO, Text("hello?"), timeout=5)
    with pytest.raises(PeerUnreachable, match="no address"):
        await b.call("12D3KooWunheardof", ECHO, Text("hello?"), timeout=5)


async def test_a_call_dials_a_peer_whose_address_was_learnt(nodes: Nodes) -> None:
    a, b = await nodes.start(), await nodes.start()
    a.learn(b.peer_id, ("nonsense", f"/ip4/127.0.0.1/tcp/1/p2p/{b.peer_id}", *b.addresses()))
    assert await a.call(b.peer_id, ECHO, Text("hi"), timeout=10) == Text("hi")


async def test_both_dial_at_once_and_end_with_one_connection(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sessions, "SURPLUS_GRACE", 0.2)
    a, b = await nodes.start(), await nodes.start()
    changes: list[bool] = []
    a.on_peer(lambda peer, up: changes.append(up))
    a.learn(b.peer_id, b.addresses())
    b.learn(a.peer_id, a.addresses())
    async with trio.open_nursery() as nursery:
        for _ in range(3):
            nursery.start_soon(lambda: a.call(b.peer_id, ECHO, Text("x"), timeout=10))
            nursery.start_soon(lambda: b.call(a.peer_id, ECHO, Text("x"), timeout=10))

    def count(network: object, peer: str) -> int:
        session = network._sessions.get(peer)  # type: ignore[attr-defined]
        return len(session.connections) if session else 0

    await eventually(lambda: count(a, b.peer_id) == count(b, a.peer_id) == 1)
    assert await a.call(b.peer_id, ECHO, Text("still"), timeout=5) == Text("still")
    assert changes == [True]


async def test_a_restarted_peer_replaces_its_former_self(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a, seed=77)
    changes: list[bool] = []
    a.on_peer(lambda peer, up: changes.append(up))
    # The same identity from a second process: the first one's connection is as good as dead.
    again = await nodes.run(nodes.make(a, seed=77))
    await eventually(lambda: changes[:2] == [False, True])
    assert await a.call(again.peer_id, ECHO, Text("hi"), timeout=5) == Text("hi")
    assert again.peer_id == b.peer_id


async def test_peers_find_each_other_again_after_a_restart(nodes: Nodes) -> None:
    a = await nodes.start(seed=50)
    b = await nodes.start(a, seed=51)
    port = int(a.addresses()[0].split("/")[4])
    await nodes.stop(a)
    await eventually(lambda: not b.peers())
    again = await nodes.run(nodes.make(seed=50, port=port))
    await connected(again, b)
    await nodes.stop(b)
    # Nothing but peers.json tells the new b where a is.
    await connected(again, await nodes.run(nodes.make(seed=51)))


async def test_a_stopped_node_is_seen_as_gone_at_once(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    await nodes.stop(b)
    await eventually(lambda: not a.peers(), within=2)
    with pytest.raises(PeerUnreachable):
        await b.call(a.peer_id, ECHO, Text("hi"), timeout=5)


async def test_a_taken_port_is_an_error_that_says_so(nodes: Nodes) -> None:
    a = await nodes.start()
    port = int(a.addresses()[0].split("/")[4])
    with pytest.raises(OSError, match=f"cannot listen on 127.0.0.1 port {port}"):
        await nodes.make(port=port).run()


async def test_a_second_connection_makes_a_dead_first_one_be_found_out(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    session = a._sessions.get(b.peer_id)
    assert session
    [first] = session.connections
    shaken = session.shaken

    # As if its packets went nowhere: what is written is taken, and nothing comes any more.
    async def swallow(data: bytes) -> None:
        await trio.lowlevel.checkpoint()

    first.muxer._secured.write = swallow  # type: ignore[method-assign]
    async with trio.open_nursery() as nursery:
        for address in b._book.addresses(a.peer_id):
            nursery.start_soon(b._host.dial, address)
    await eventually(first.muxer.closed.is_set, within=sessions.CHECK_TIMEOUT + 2)
    assert not first.muxer.orderly
    await eventually(shaken.is_set, within=2)
    assert a._sessions.get(b.peer_id) is session
    assert await a.call(b.peer_id, ECHO, Text("still here"), timeout=5) == Text("still here")
