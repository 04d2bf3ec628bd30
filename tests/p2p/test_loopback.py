"""Frames to oneself: handled in the sender's task where nothing is before them, and in order."""

import logging

import pytest
import trio
import trio.testing

from pxd.p2p.inbox import FrameInbox
from pxd.p2p.loopback import Loopback
from pxd.p2p.services import Services
from pxd.wire import Buffer, Cancel, Frame


class Handler:
    """Notes the frames it is done with, and waits with each of them while `gate` is not set."""

    def __init__(self, nursery: trio.Nursery) -> None:
        self.handled: list[str] = []
        self.gate = trio.Event()
        self.gate.set()
        inbox = FrameInbox()
        inbox.on_frame(self.handle)
        self.loopback = Loopback("me", Services(), inbox)
        nursery.start_soon(self.loopback.run)

    async def handle(self, peer: str, frame: Frame, body: Buffer) -> None:
        assert isinstance(frame, Cancel)
        assert peer == "me"
        await self.gate.wait()
        if frame.request == "bad":
            raise RuntimeError("a handler that fails")
        self.handled.append(frame.request)

    async def send(self, name: str) -> None:
        await self.loopback.send(Cancel(request=name), b"")


@pytest.fixture
def handler(nursery: trio.Nursery) -> Handler:
    return Handler(nursery)


async def test_a_frame_is_handled_before_its_sender_goes_on(handler: Handler) -> None:
    await handler.send("1")
    assert handler.handled == ["1"]


async def test_frames_behind_one_that_waits_keep_their_order_and_hold_nobody_back(
    handler: Handler, nursery: trio.Nursery
) -> None:
    handler.gate = trio.Event()
    nursery.start_soon(handler.send, "1")
    await trio.testing.wait_all_tasks_blocked()
    for name in ("2", "3"):
        await handler.send(name)
    handler.gate.set()
    await handler.send("4")
    await trio.testing.wait_all_tasks_blocked()
    assert handler.handled == ["1", "2", "3", "4"]
    await handler.send("5")
    assert handler.handled[-1] == "5"


async def test_a_sender_that_is_cancelled_takes_only_its_own_frame_back(
    handler: Handler, nursery: trio.Nursery
) -> None:
    scope = trio.CancelScope()

    async def give_up() -> None:
        with scope:
            await handler.send("given up")

    handler.gate = trio.Event()
    nursery.start_soon(give_up)
    await trio.testing.wait_all_tasks_blocked()
    await handler.send("after it")
    scope.cancel()
    handler.gate.set()
    await trio.testing.wait_all_tasks_blocked()
    assert handler.handled == ["after it"]


async def test_a_handler_that_fails_is_logged_and_the_next_frame_handled(
    handler: Handler, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.ERROR, "pxd.p2p"):
        await handler.send("bad")
    await handler.send("good")
    assert "a handler that fails" in caplog.text
    assert handler.handled == ["good"]
