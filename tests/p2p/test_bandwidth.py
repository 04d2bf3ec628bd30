"""Measuring what a data channel carries: between real nodes, and who refuses what."""

import contextlib
import itertools
import logging

import pytest
import trio

from pxd import wire
from pxd.p2p import bandwidth
from pxd.p2p.bandwidth import BEGIN, FRAMES, FROM_ONE_PEER_S, ROUNDS, SENT, Begin, Meter, Sent
from pxd.p2p.libp2p_network import Libp2pNetwork
from pxd.p2p.network import CallFailed, PeerUnreachable
from tests.p2p.nodes import ECHO, Nodes, Text, eventually


class Measured:
    """A node that others may measure; notes how much filler came."""

    def __init__(self, network: Libp2pNetwork) -> None:
        self.network = network
        self.meter = Meter(network, lambda: self.busy)
        self.busy = False
        self.bytes = 0
        self.fillers = 0
        network.on_frame(self.handle)

    async def handle(self, peer: str, frame: wire.Frame, body: wire.Buffer) -> None:
        if isinstance(frame, wire.Filler):
            self.meter.arrived(peer, frame)
            self.bytes += len(body)
            self.fillers += 1


@pytest.fixture(params=[True, False], ids=["tls", "libp2p"])
async def two(nodes: Nodes, request: pytest.FixtureRequest) -> tuple[Measured, Measured]:
    a = await nodes.start(direct=request.param)
    return Measured(a), Measured(await nodes.start(a, direct=request.param))


def filler(number: int, round_: int = 0, size: int = ROUNDS[0] // FRAMES) -> wire.Filler:
    return wire.Filler(number=number, round=round_, tensor=wire.Tensor("i32", (size // 4,)))


async def test_a_measurement_takes_little_and_yields_a_figure(
    two: tuple[Measured, Measured],
) -> None:
    a, b = two
    assert await a.meter.measure(b.network.peer_id) > 0
    assert ROUNDS[0] <= b.bytes <= sum(ROUNDS)
    # Soon again it is refused, while the other direction is another matter.
    with pytest.raises(CallFailed, match="too-often"):
        await a.meter.measure(b.network.peer_id)
    assert await b.meter.measure(a.network.peer_id) > 0


async def test_a_slow_link_ends_it_after_the_first_round(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "LONG_ENOUGH_S", 0.0)
    a = Measured(await nodes.start())
    b = Measured(await nodes.start(a.network))
    assert await a.meter.measure(b.network.peer_id) > 0
    assert b.bytes == ROUNDS[0]


async def test_nobody_is_measured_while_either_end_is_busy(
    two: tuple[Measured, Measured],
) -> None:
    a, b = two
    b.busy = True
    with pytest.raises(CallFailed, match="busy"):
        await a.meter.measure(b.network.peer_id)
    b.busy, a.busy = False, True
    with pytest.raises(bandwidth.Interrupted):
        await a.meter.measure(b.network.peer_id)
    a.busy = False
    # Work that comes up meanwhile ends it before the next frame.
    real_send = a.network.send

    async def send(peer: str, frame: wire.Frame, body: wire.Buffer = b"") -> None:
        await real_send(peer, frame, body)
        a.busy = True

    a.network.send = send  # type: ignore[method-assign]
    with pytest.raises(bandwidth.Interrupted):
        await a.meter.measure(b.network.peer_id)
    await eventually(lambda: b.fillers == 1)
    a.busy = False
    # To b it seems to go on still.
    with pytest.raises(bandwidth.Interrupted):
        await b.meter.measure(a.network.peer_id)


async def test_only_one_may_measure_at_a_time(nodes: Nodes) -> None:
    a = Measured(await nodes.start())
    b = Measured(await nodes.start(a.network))
    c = await nodes.start(a.network)
    await b.network.call(a.network.peer_id, BEGIN, Begin(1), timeout=5)
    with pytest.raises(CallFailed, match="busy"):
        await c.call(a.network.peer_id, BEGIN, Begin(1), timeout=5)


async def test_filler_that_nobody_agreed_to_closes_the_channel(
    nodes: Nodes, caplog: pytest.LogCaptureFixture
) -> None:
    a = Measured(await nodes.start())
    b = await nodes.start(a.network)

    async def send_until_refused(*frames: wire.Filler) -> int:
        """How many of the frames were taken."""
        before = a.fillers
        caplog.clear()
        for frame in frames:
            try:
                await b.send(a.network.peer_id, frame, bytes(frame.tensor.nbytes))
            except PeerUnreachable:
                break
        else:
            # The channel says once that it was closed, as soon as that has come here.
            with trio.fail_after(10), contextlib.suppress(PeerUnreachable):
                while True:
                    await b.send(a.network.peer_id, wire.Cancel(request="nothing"))
                    await trio.sleep(0.01)
        await eventually(lambda: "closing the data channel" in caplog.text)
        return a.fillers - before

    with caplog.at_level(logging.WARNING, "pxd.p2p"):
        assert await send_until_refused(filler(7)) == 0
        await b.call(a.network.peer_id, BEGIN, Begin(7), timeout=5)
        assert await send_until_refused(*[filler(7)] * FRAMES, filler(7)) == FRAMES
        assert await send_until_refused(filler(7, 1, size=ROUNDS[1] // FRAMES + 4)) == 0
        assert await send_until_refused(filler(8)) == 0
        assert await send_until_refused(filler(7, round_=len(ROUNDS))) == 0
    # It costs the channel, not the connection.
    assert await b.call(a.network.peer_id, ECHO, Text("hi"), timeout=5) == Text("hi")


async def test_what_never_arrives_is_not_waited_for_for_ever(
    nodes: Nodes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bandwidth, "ANSWER_TIMEOUT_S", 0.2)
    a = Measured(await nodes.start())
    b = await nodes.start(a.network)
    with pytest.raises(CallFailed, match="unknown-measurement"):
        await b.call(a.network.peer_id, SENT, Sent(1, 0), timeout=5)
    await b.call(a.network.peer_id, BEGIN, Begin(1), timeout=5)
    await b.send(a.network.peer_id, filler(1), bytes(filler(1).tensor.nbytes))
    with pytest.raises(CallFailed, match=f"incomplete: 1 of {FRAMES}"):
        await b.call(a.network.peer_id, SENT, Sent(1, 0), timeout=5)


async def test_many_members_together_cannot_have_a_node_measured_all_the_time(
    autojump_clock: trio.testing.MockClock,
) -> None:
    class Nowhere:
        peer_id = "me"

        def serve(self, method: object, handler: object) -> None:
            pass

    meter = Meter(Nowhere(), lambda: False)  # type: ignore[arg-type]
    granted: list[tuple[float, str]] = []
    for second in range(600):
        for peer in range(50):
            try:
                await meter._on_begin(f"peer{peer}", Begin(second))
            except CallFailed:
                continue
            granted.append((trio.current_time(), f"peer{peer}"))
            for index, size in enumerate(ROUNDS):
                for _ in range(FRAMES):
                    meter.arrived(f"peer{peer}", filler(second, index, size // FRAMES))
        await trio.sleep(1)
    assert 600 / bandwidth.FROM_ALL_S - 2 <= len(granted) <= 600 / bandwidth.FROM_ALL_S + 2
    for peer in {name for _, name in granted}:
        times = [time for time, name in granted if name == peer]
        gaps = [later - sooner for sooner, later in itertools.pairwise(times)]
        assert all(gap >= FROM_ONE_PEER_S for gap in gaps)
