"""Comparing clocks with a peer."""

import pytest
import trio

from pxd.p2p.clock import CLOCK, SAMPLES, Clock, ClockAsk, ClockSays
from pxd.p2p.network import NetworkError
from tests.p2p.nodes import Nodes


async def test_a_peer_whose_clock_is_ahead(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    ahead = Clock(wall=lambda: trio.current_time() + 100.0, steady=trio.current_time)
    a.serve(CLOCK, ahead.serve)
    here = Clock(wall=trio.current_time, steady=trio.current_time)
    offset = await here.compare(b, a.peer_id, timeout=5)
    assert abs(offset.seconds - 100.0) <= offset.uncertainty
    b.serve(CLOCK, here.serve)
    back = await ahead.compare(a, b.peer_id, timeout=5)
    assert abs(back.seconds + 100.0) <= back.uncertainty


class Scripted:
    """A network on which calls take the given times on the way there, and none back."""

    def __init__(self, *delays: float) -> None:
        self._delays = list(delays)
        self.time = 0.0

    async def call(
        self, peer: str, method: object, request: object, *, timeout: float
    ) -> ClockSays:
        delay = self._delays.pop(0)
        self.time += delay
        return ClockSays(self.time + 5.0)


async def test_the_quickest_sample_counts() -> None:
    network = Scripted(0.4, 0.02, 0.2)
    clock = Clock(wall=lambda: network.time, steady=lambda: network.time)
    offset = await clock.compare(network, "ben", timeout=1)  # type: ignore[arg-type]
    # All of the delay lies on one side: the formula is off by half of it, as it says.
    assert offset.uncertainty == pytest.approx(0.01)
    assert offset.seconds == pytest.approx(5.01)
    assert SAMPLES == 3


async def test_a_peer_that_does_not_tell(nodes: Nodes) -> None:
    a = await nodes.start()
    b = await nodes.start(a)
    with pytest.raises(NetworkError):
        await Clock().compare(b, a.peer_id, timeout=5)


async def test_the_answer_is_the_wall_clock() -> None:
    assert await Clock(wall=lambda: 12.5).serve("anybody", ClockAsk()) == ClockSays(12.5)
