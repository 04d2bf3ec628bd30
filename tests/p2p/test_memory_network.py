import msgspec
import pytest
import trio

from pxd import wire
from pxd.p2p.network import CallFailed, CallTimeout, Method, PeerUnreachable
from tests.memory_network import MemoryHub, MemoryNetwork


class Ask(msgspec.Struct):
    text: str


class Told(msgspec.Struct):
    text: str


ECHO = Method("test.echo", Ask, Told)
NOTE: Method[Ask, None] = Method("test.note", Ask, type(None))


async def echo(peer: str, request: Ask) -> Told:
    return Told(f"{peer}: {request.text}")


@pytest.fixture
async def hub(nursery: trio.Nursery) -> MemoryHub:
    return MemoryHub()


async def send_for_ever(network: MemoryNetwork) -> None:
    while True:
        await network.send("b", wire.Cancel(request="bad"))


async def start(nursery: trio.Nursery, hub: MemoryHub, *names: str) -> list[MemoryNetwork]:
    networks = [hub.network(name) for name in names]
    for network in networks:
        await nursery.start(network.run)
    return networks


async def test_calls_reach_the_other_side_and_oneself(
    nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    a.serve(ECHO, echo)
    b.serve(ECHO, echo)
    assert await a.call("b", ECHO, Ask("hi"), timeout=5) == Told("a: hi")
    assert await a.call("a", ECHO, Ask("me"), timeout=5) == Told("a: me")


async def test_typed_errors(nursery: trio.Nursery, hub: MemoryHub) -> None:
    a, b = await start(nursery, hub, "a", "b")

    async def refuse(peer: str, request: Ask) -> Told:
        raise CallFailed("busy", "later")

    async def never(peer: str, request: Ask) -> Told:
        await trio.sleep_forever()
        raise AssertionError

    with pytest.raises(CallFailed) as unknown:
        await a.call("b", ECHO, Ask("hi"), timeout=5)
    assert unknown.value.code == "unknown-method"
    b.serve(ECHO, refuse)
    with pytest.raises(CallFailed) as refused:
        await a.call("b", ECHO, Ask("hi"), timeout=5)
    assert refused.value.code == "busy"
    slow = Method("test.slow", Ask, Told)
    b.serve(slow, never)
    with pytest.raises(CallTimeout):
        await a.call("b", slow, Ask("hi"), timeout=0)
    with pytest.raises(CallFailed) as wrong:
        await a.call("b", Method("test.echo", Told, Told), 3, timeout=5)
    assert wrong.value.code == "bad-request"
    with pytest.raises(PeerUnreachable):
        await a.call("nobody", ECHO, Ask("hi"), timeout=5)


async def test_a_cut_ends_calls_and_is_seen_on_both_sides(
    nursery: trio.Nursery, hub: MemoryHub
) -> None:
    seen: list[tuple[str, str, bool]] = []
    a, b = await start(nursery, hub, "a", "b")
    for network in (a, b):
        network.on_peer(lambda peer, up, here=network.peer_id: seen.append((here, peer, up)))
    asked = trio.Event()

    async def never(peer: str, request: Ask) -> Told:
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    b.serve(ECHO, never)

    async def cut() -> None:
        await asked.wait()
        hub.cut("a")

    nursery.start_soon(cut)
    with pytest.raises(PeerUnreachable):
        await a.call("b", ECHO, Ask("hi"), timeout=5)
    assert a.peers() == b.peers() == frozenset()
    hub.heal("a")
    assert a.peers() == {"b"}
    assert set(seen[:2]) == {("a", "b", False), ("b", "a", False)}
    assert set(seen[2:]) == {("a", "b", True), ("b", "a", True)}


async def test_frames_keep_their_order_and_a_failing_handler_closes_one_channel(
    nursery: trio.Nursery, hub: MemoryHub
) -> None:
    a, b = await start(nursery, hub, "a", "b")
    send, receive = trio.open_memory_channel(float("inf"))

    async def handle(peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        if isinstance(frame, wire.Cancel) and frame.request == "bad":
            raise RuntimeError("no")
        await send.send((peer, frame, bytes(body)))

    b.on_frame(handle)
    a.on_frame(handle)
    tensor = wire.Tensor("i32", (2,))
    step = wire.Step(pipeline="p", session=1, step=0, rows=(), tensor=tensor)
    await a.send("b", step, b"12345678")
    for number in range(50):
        await a.send("b", wire.Cancel(request=str(number)))
    await a.send("a", wire.Cancel(request="self"))
    got = [await receive.receive() for _ in range(52)]
    at_b = [item for item in got if item[1] != wire.Cancel(request="self")]
    assert at_b[0] == ("a", step, b"12345678")
    assert [item[1].request for item in at_b[1:]] == [str(n) for n in range(50)]
    with pytest.raises(PeerUnreachable):
        await send_for_ever(a)
    await a.send("b", wire.Cancel(request="again"))
    assert (await receive.receive())[1] == wire.Cancel(request="again")


async def test_casts_arrive_in_order_and_never_raise(nursery: trio.Nursery, hub: MemoryHub) -> None:
    a, b = await start(nursery, hub, "a", "b")
    send, receive = trio.open_memory_channel[str](float("inf"))

    async def note(peer: str, message: Ask) -> None:
        await send.send(message.text)

    b.serve(NOTE, note)
    for number in range(5):
        a.cast("b", NOTE, Ask(str(number)))
        a.cast("nobody", NOTE, Ask("lost"))
    assert [await receive.receive() for _ in range(5)] == list("01234")


async def test_without_a_mesh_a_learnt_peer_is_dialled_on_demand(nursery: trio.Nursery) -> None:
    hub = MemoryHub(mesh=False)
    a, b = await start(nursery, hub, "a", "b")
    b.serve(ECHO, echo)
    with pytest.raises(PeerUnreachable):
        await a.call("b", ECHO, Ask("hi"), timeout=5)
    a.learn("b", b.addresses())
    assert await a.call("b", ECHO, Ask("hi"), timeout=5) == Told("a: hi")
    assert b.peers() == {"a"}


async def test_a_stopped_network_is_gone_for_the_others(
    nursery: trio.Nursery, hub: MemoryHub
) -> None:
    (a,) = await start(nursery, hub, "a")
    async with trio.open_nursery() as other:
        await start(other, hub, "b")
        assert a.peers() == {"b"}
        other.cancel_scope.cancel()
    assert a.peers() == frozenset()
    with pytest.raises(PeerUnreachable):
        await a.send("b", wire.Cancel(request="x"))
