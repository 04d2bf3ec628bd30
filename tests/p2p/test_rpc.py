"""Calls and casts between real networks."""

import msgspec
import pytest
import trio

from pxd.p2p import rpc
from pxd.p2p.network import CallFailed, CallTimeout, Method, PeerUnreachable
from pxd.p2p.services import MESSAGE_LIMIT
from tests.p2p.nodes import ECHO, NOTE, Nodes, Text, eventually


class Number(msgspec.Struct):
    number: int


SLOW = Method("test.slow", Text, Text)
REFUSE = Method("test.refuse", Text, Text)
CRASH = Method("test.crash", Text, Text)


async def test_errors_have_types(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)

    async def refuse(peer: str, request: Text) -> Text:
        raise CallFailed("not-today", "come back tomorrow")

    async def crash(peer: str, request: Text) -> Text:
        raise ZeroDivisionError

    a.serve(REFUSE, refuse)
    a.serve(CRASH, crash)

    async def code(method: Method[object, object], request: object) -> str:
        with pytest.raises(CallFailed) as failure:
            await b.call(a.peer_id, method, request, timeout=5)
        return f"{failure.value.code} | {failure.value}"

    assert await code(REFUSE, Text("")) == "not-today | not-today: come back tomorrow"
    assert (await code(CRASH, Text(""))).startswith("internal")
    assert (await code(Method("no.such", Text, Text), Text(""))).startswith("unknown-method")
    assert (await code(Method("test.echo", Number, Text), Number(1))).startswith("bad-request")
    assert (await code(Method("test.echo", Text, Number), Text(""))).startswith("bad-response")
    too_large = Text("x" * (MESSAGE_LIMIT + 1))
    assert (await code(ECHO, too_large)).startswith("too-large")
    # None of this cost the connection.
    almost = Text("x" * (MESSAGE_LIMIT - 100))
    assert await b.call(a.peer_id, ECHO, almost, timeout=30) == almost


async def test_a_deadline_ends_the_call_on_both_sides(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    cancelled = trio.Event()

    async def slow(peer: str, request: Text) -> Text:
        try:
            await trio.sleep_forever()
        finally:
            cancelled.set()
        raise AssertionError

    a.serve(SLOW, slow)
    with pytest.raises(CallTimeout):
        await b.call(a.peer_id, SLOW, Text(""), timeout=0.1)
    with trio.fail_after(5):
        await cancelled.wait()
    with pytest.raises(CallTimeout):
        await a.call(a.peer_id, SLOW, Text(""), timeout=0.1)


async def test_cancelled_calls_leave_the_connection_usable(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    running = 0

    async def slow(peer: str, request: Text) -> Text:
        nonlocal running
        running += 1
        try:
            await trio.sleep_forever()
        finally:
            running -= 1
        raise AssertionError

    a.serve(SLOW, slow)
    for wanted in (1, 20, rpc.CALLS_IN_FLIGHT):
        async with trio.open_nursery() as nursery:
            for _ in range(wanted):
                nursery.start_soon(lambda: b.call(a.peer_id, SLOW, Text("x" * 9999), timeout=30))
            await eventually(lambda wanted=wanted: running == wanted)
            nursery.cancel_scope.cancel()
        assert await b.call(a.peer_id, ECHO, Text("hi"), timeout=5) == Text("hi")
        await eventually(lambda: running == 0)


async def test_slow_calls_do_not_hold_up_others_until_the_limit(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    gate = trio.Event()

    async def slow(peer: str, request: Text) -> Text:
        await gate.wait()
        return request

    a.serve(SLOW, slow)
    answers: list[Text] = []

    async def ask(number: int) -> None:
        answers.append(await b.call(a.peer_id, SLOW, Text(str(number)), timeout=30))

    async with trio.open_nursery() as nursery:
        for number in range(rpc.CALLS_IN_FLIGHT - 1):
            nursery.start_soon(ask, number)
        await trio.testing.wait_all_tasks_blocked()
        assert await b.call(a.peer_id, ECHO, Text("quick"), timeout=5) == Text("quick")
        for number in range(rpc.CALLS_IN_FLIGHT - 1, 3 * rpc.CALLS_IN_FLIGHT):
            nursery.start_soon(ask, number)
        gate.set()
    assert {int(answer.text) for answer in answers} == set(range(3 * rpc.CALLS_IN_FLIGHT))


async def test_the_loss_of_the_peer_ends_waiting_calls(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    asked = trio.Event()

    async def slow(peer: str, request: Text) -> Text:
        asked.set()
        await trio.sleep_forever()
        raise AssertionError

    a.serve(SLOW, slow)

    async def stop() -> None:
        await asked.wait()
        await nodes.stop(a)

    async with trio.open_nursery() as nursery:
        nursery.start_soon(stop)
        with pytest.raises(PeerUnreachable):
            await b.call(a.peer_id, SLOW, Text(""), timeout=30)


async def test_casts_arrive_in_order_and_are_flushed_when_a_node_stops(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    heard: list[str] = []

    async def note(peer: str, message: Text) -> None:
        heard.append(message.text)

    a.serve(NOTE, note)
    b.serve(NOTE, note)
    b.cast(b.peer_id, NOTE, Text("to myself"))
    await eventually(lambda: heard == ["to myself"])
    heard.clear()
    for number in range(100):
        b.cast(a.peer_id, NOTE, Text(str(number)))
    b.cast("12D3KooWnobody", NOTE, Text("lost"))
    await nodes.stop(b)
    await eventually(lambda: len(heard) == 100)
    assert heard == [str(number) for number in range(100)]


async def test_a_cast_dials_in_the_background(nodes: Nodes) -> None:
    a, b = await nodes.start(), await nodes.start()
    heard: list[str] = []

    async def note(peer: str, message: Text) -> None:
        heard.append(message.text)

    a.serve(NOTE, note)
    b.learn(a.peer_id, a.addresses())
    for number in range(3):
        b.cast(a.peer_id, NOTE, Text(str(number)))
    await eventually(lambda: heard == ["0", "1", "2"])


async def test_a_handler_that_never_ends_does_not_stop_the_others(nodes: Nodes) -> None:
    a = await nodes.start()
    b, c = await nodes.start(a), await nodes.start(a)

    async def stuck(peer: str, message: Text) -> None:
        await trio.sleep_forever()

    a.serve(NOTE, stuck)
    for _ in range(1000):
        b.cast(a.peer_id, NOTE, Text("x" * 5000))
    assert await b.call(a.peer_id, ECHO, Text("me"), timeout=5) == Text("me")
    assert await c.call(a.peer_id, ECHO, Text("me too"), timeout=5) == Text("me too")
