"""Bytes of models that this node has asked for: the calls, and the frames that they bring."""

import itertools
import os
from collections.abc import Callable

import trio

from pxd.p2p.network import CallTimeout, Method, Network, NetworkError, RequestT
from pxd.serving.weights.calls import Sent
from pxd.wire import Buffer, Weights

READ_TIMEOUT_S = 60.0


class _Slot:
    def __init__(self, peer: str, size: int) -> None:
        self.peer = peer
        self.size = size
        self.body: Buffer = b""
        self.filled = trio.Event()


class Arrivals:
    """The owner hands over the `Weights` frames that arrive. No other ones are read."""

    def __init__(self, network: Network) -> None:
        self._network = network
        # Not those of the life before, whose frames may still be on their way.
        self._numbers = itertools.count(int.from_bytes(os.urandom(5), "big"))
        self._slots: dict[int, _Slot] = {}
        self.bytes = 0

    @property
    def expecting(self) -> bool:
        return bool(self._slots)

    def expects(self, peer: str, frame: Weights) -> bool:
        slot = self._slots.get(frame.number)
        return slot is not None and (slot.peer, slot.size) == (peer, frame.size)

    def arrived(self, peer: str, frame: Weights, body: Buffer) -> None:
        if self.expects(peer, frame) and len(body) == frame.size:
            slot = self._slots[frame.number]
            slot.body = body
            slot.filled.set()
            self.bytes += frame.size

    async def ask(
        self,
        peer: str,
        method: Method[RequestT, Sent],
        request: Callable[[int], RequestT],
        size: int,
    ) -> tuple[memoryview, bool]:
        """Call `method` of `peer` with `request(number)`; returns the `size` bytes that it sends,
        and whether it is busy. Raises `NetworkError`."""
        busy = False
        number = next(self._numbers)
        slot = self._slots[number] = _Slot(peer, size)
        try:
            with trio.move_on_after(READ_TIMEOUT_S):
                call = self._network.call
                sent = await call(peer, method, request(number), timeout=READ_TIMEOUT_S)
                busy = sent.busy
                await slot.filled.wait()
        except NetworkError:
            # The bytes may be here all the same.
            if not slot.filled.is_set():
                raise
        finally:
            del self._slots[number]
        if not slot.filled.is_set():
            raise CallTimeout(f"{size} bytes did not come from {peer} in {READ_TIMEOUT_S:g} s")
        return memoryview(slot.body), busy
