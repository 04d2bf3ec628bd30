"""How much a data channel carries, found out by sending filler over it: little, briefly, seldom.

The sender asks for leave, then sends rounds of growing size until one takes long enough to be told
from noise, so that a slow link is not kept busy and a fast one not underrated. The receiver takes
the time, from the first frame of a round to its last, in which neither latency nor the opening of
the channel counts.
"""

import itertools
import os
from collections import OrderedDict
from collections.abc import Callable
from typing import Annotated

import msgspec
import trio

from pxd import wire
from pxd.cluster.allowance import Allowance
from pxd.p2p.network import CallFailed, CallTimeout, Method, Network

ROUNDS = (64 << 10, 256 << 10, 1 << 20, 3 << 20)
"""Bytes. All of them together are the most that one measurement sends."""

FRAMES = 16
"""Per round."""

LONG_ENOUGH_S = 0.03
"""A round that takes this long is the last one; the next would take four times as long at most."""

ANSWER_TIMEOUT_S = 5.0
LONGEST_S = 12.0
"""For all of it. The receiver then takes another one."""

FROM_ONE_PEER_S = 60.0
FROM_ALL_S = 5.0
"""Least seconds between two measurements that one peer, or anybody, is granted on average."""

PEERS_KEPT = 1024
_LEAST_S = 1e-5

_Number = Annotated[int, msgspec.Meta(ge=0, lt=1 << 48)]
_RoundIndex = Annotated[int, msgspec.Meta(ge=0, lt=len(ROUNDS))]


class Begin(msgspec.Struct, frozen=True):
    """Asks for leave to send measurement `number`; answered with an error where it is not given."""

    number: _Number


class Sent(msgspec.Struct, frozen=True):
    """A round is on its way; the answer is to come once it has arrived."""

    number: _Number
    round: _RoundIndex


class Took(msgspec.Struct, frozen=True):
    """Seconds from the first frame of the round to the last."""

    seconds: Annotated[float, msgspec.Meta(ge=0, le=LONGEST_S)]


BEGIN: Method[Begin, None] = Method("pxd.bandwidth.begin", Begin, type(None), limit=256)
SENT = Method("pxd.bandwidth.sent", Sent, Took, limit=256)


class Interrupted(Exception):
    """This node has better things to do now."""


class _Round:
    def __init__(self) -> None:
        self.frames = 0
        self.began = 0.0
        self.seconds = 0.0
        self.complete = trio.Event()

    def add(self, now: float) -> None:
        """Raises `wire.WireError` for a frame too many."""
        if self.complete.is_set():
            raise wire.WireError("more filler than belongs to a measurement")
        if not self.frames:
            self.began = now
        self.frames += 1
        if self.frames == FRAMES:
            self.seconds = min(now - self.began, LONGEST_S)
            self.complete.set()


class _Incoming:
    """A measurement by `peer` that this node has agreed to."""

    def __init__(self, peer: str, number: int, until: float) -> None:
        self.peer = peer
        self.number = number
        self.until = until
        self.rounds = [_Round() for _ in ROUNDS]

    def running(self, now: float) -> bool:
        over = self.rounds[-1].complete.is_set() or any(
            each.complete.is_set() and each.seconds >= LONG_ENOUGH_S for each in self.rounds
        )
        return now < self.until and not over


class Meter:
    """Measures, and lets others measure; one measurement at a time, and none while `busy()`.

    The owner hands over the `wire.Filler` frames that arrive.
    """

    def __init__(self, network: Network, busy: Callable[[], bool]) -> None:
        self._network = network
        self._busy = busy
        self._numbers = itertools.count(int.from_bytes(os.urandom(4), "big"))
        self._filler = b""
        self._measuring = False
        self._incoming: _Incoming | None = None
        self._granted: OrderedDict[str, float] = OrderedDict()
        self._allowance = Allowance(1 / FROM_ALL_S, 2.0)
        network.serve(BEGIN, self._on_begin)
        network.serve(SENT, self._on_sent)

    async def measure(self, peer: str) -> float:
        """GB/s of payload from this node to `peer`; takes `LONGEST_S` at most.

        Raises `Interrupted`, or `NetworkError`: a peer that is busy refuses.
        """
        if self._measuring or self._in_use() or self._busy():
            raise Interrupted
        self._measuring = True
        try:
            with trio.move_on_after(LONGEST_S):
                return await self._measure(peer)
            raise CallTimeout(f"a measurement of the way to {peer} took over {LONGEST_S:g} s")
        finally:
            self._measuring = False

    async def _measure(self, peer: str) -> float:
        # It must not be shorter where something on the way compresses.
        self._filler = self._filler or os.urandom(ROUNDS[-1] // FRAMES)
        number = next(self._numbers)
        await self._network.call(peer, BEGIN, Begin(number), timeout=ANSWER_TIMEOUT_S)
        rate = 0.0
        for index, size in enumerate(ROUNDS):
            body = memoryview(self._filler)[: size // FRAMES]
            frame = wire.Filler(number=number, round=index, tensor=_tensor(len(body)))
            for _ in range(FRAMES):
                if self._busy():
                    raise Interrupted
                await self._network.send(peer, frame, body)
            sent = Sent(number, index)
            took = await self._network.call(peer, SENT, sent, timeout=ANSWER_TIMEOUT_S)
            # Nothing is known of how long the first frame took.
            rate = len(body) * (FRAMES - 1) / max(took.seconds, _LEAST_S) / 1e9
            if took.seconds >= LONG_ENOUGH_S:
                break
        return rate

    def arrived(self, peer: str, frame: wire.Filler) -> None:
        """Raises `wire.WireError` for filler that this node has not agreed to."""
        incoming = self._incoming
        if (
            incoming is None
            or (incoming.peer, incoming.number) != (peer, frame.number)
            or frame.round >= len(ROUNDS)
            or frame.tensor.nbytes > ROUNDS[frame.round] // FRAMES
        ):
            raise wire.WireError("filler that nobody asked for")
        incoming.rounds[frame.round].add(trio.current_time())

    def _in_use(self) -> bool:
        return self._incoming is not None and self._incoming.running(trio.current_time())

    async def _on_begin(self, peer: str, begin: Begin) -> None:
        """Raises `CallFailed`: "busy" or "too-often"."""
        now = trio.current_time()
        if self._measuring or self._in_use() or self._busy():
            raise CallFailed("busy", "this node has better things to do now")
        since = now - self._granted.get(peer, float("-inf"))
        if since < FROM_ONE_PEER_S or not self._allowance.take(now):
            raise CallFailed("too-often", "this node was measured a short while ago")
        self._granted.pop(peer, None)
        self._granted[peer] = now
        if len(self._granted) > PEERS_KEPT:
            self._granted.popitem(last=False)
        self._incoming = _Incoming(peer, begin.number, now + LONGEST_S)

    async def _on_sent(self, peer: str, sent: Sent) -> Took:
        incoming = self._incoming
        if incoming is None or (incoming.peer, incoming.number) != (peer, sent.number):
            raise CallFailed("unknown-measurement", "this node knows nothing of it")
        which = incoming.rounds[sent.round]
        with trio.move_on_after(ANSWER_TIMEOUT_S):
            await which.complete.wait()
            return Took(which.seconds)
        raise CallFailed("incomplete", f"{which.frames} of {FRAMES} frames arrived")


def _tensor(size: int) -> wire.Tensor:
    return wire.Tensor("i32", (size // wire.DTYPE_BYTES["i32"],))
