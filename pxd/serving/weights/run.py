"""One transfer: the chunks that a stage lacks, from all nodes that have them."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from itertools import groupby, takewhile
from typing import Protocol

import trio

from pxd.models.chunks import DIGEST_BYTES, Chunk, digest_of
from pxd.models.errors import ModelError
from pxd.models.kept import KeptFiles, Label, disk_error
from pxd.models.manifest import Held, Manifest
from pxd.models.transfer import Ask, Transfer, agree
from pxd.p2p.network import CallFailed, Network, NetworkError
from pxd.serving.signal import Signal
from pxd.serving.weights.arrivals import Arrivals
from pxd.serving.weights.calls import (
    DIGESTS,
    MAX_DIGESTS,
    NOT_HERE,
    READ_CHUNKS,
    DigestsOf,
    ReadChunks,
    Which,
)

log = logging.getLogger("pxd.serving.weights")

DIGESTS_TIMEOUT_S = 120.0
WITNESSES = 3
"""How many sources are asked for the same digests: all that have them must agree."""

ENOUGH_WAITING = 2 * MAX_DIGESTS
LOOK_EVERY_S = 10.0
HOPE_S = 20.0
"""For how long nothing may come before the transfer is given up; it can go on later."""


class Progress(Protocol):
    def __call__(self, done: float, words: str = "") -> None:
        """`done` from 0 to 1; `words` say what is going on."""


class Lenders(Protocol):
    """What a transfer needs to know of the cluster."""

    arrivals: Arrivals

    @property
    def network(self) -> Network: ...
    @property
    def busy(self) -> bool: ...
    def name_of(self, peer: str) -> str: ...
    async def sources(
        self, name: str, fingerprint: str, enough: Callable[[Mapping[str, Manifest]], bool]
    ) -> dict[str, Manifest]: ...


class Run:
    """`total` bytes are what all wanted tensors have, those that are here already among them.
    `came` counts the bytes that have come, also in vain."""

    def __init__(
        self,
        lenders: Lenders,
        name: str,
        label: Label,
        files: KeptFiles,
        total: int,
        progress: Progress,
    ) -> None:
        self._lenders = lenders
        self._name = name
        self._label = label
        self._files = files
        self._total = total
        self._progress = progress
        self._transfer = Transfer()
        self._held: dict[str, Held] = {}
        self._digests: dict[Chunk, bytes] = {}
        self._left = 0
        self._learned = False
        self._unclaimed: Chunk | None = None
        self._hearing = 0
        self.came = 0
        self._changed = Signal()
        self._failure: ModelError | None = None
        self._aside: dict[str, str] = {}

    async def fetch(self, wanted: Sequence[Chunk]) -> None:
        """Raises `ModelError` where it cannot go on; what has come stays."""
        self._left = sum(chunk.size for chunk in wanted)
        await self._look()
        async with trio.open_nursery() as nursery:
            nursery.start_soon(self._keep_looking)
            nursery.start_soon(self._learn_digests, wanted)
            await self._drive(nursery)
            nursery.cancel_scope.cancel()
        if self._failure is not None:
            raise self._failure

    async def _look(self) -> None:
        found = await self._lenders.sources(
            self._name, self._label.fingerprint, self._have_all_of_it
        )
        for peer, manifest in found.items():
            if self._is_usable(peer, manifest):
                self._held[peer] = held = Held(manifest.weights)
                self._transfer.offer(peer, held)
        self._changed.notify()

    def _is_usable(self, peer: str, manifest: Manifest) -> bool:
        return manifest.mark == self._label.mark and peer not in self._transfer.banned

    def _have_all_of_it(self, found: Mapping[str, Manifest]) -> bool:
        """Whether one of them has the whole model, as far as there are files for it here."""
        return any(
            self._is_usable(peer, manifest) and self._files.all_in(manifest.weights)
            for peer, manifest in found.items()
        )

    async def _keep_looking(self) -> None:
        while True:
            await trio.sleep(LOOK_EVERY_S)
            await self._look()

    async def _drive(self, nursery: trio.Nursery) -> None:
        hope, left = trio.current_time() + HOPE_S, self._left
        while self._failure is None and not (self._learned and self._transfer.idle):
            event, now = self._changed.event, trio.current_time()
            if self._left < left:
                hope, left = now + HOPE_S, self._left
            while ask := self._transfer.next(now, sparingly=self._lenders.busy):
                nursery.start_soon(self._ask, ask)
            if now >= hope and not self._transfer.asking and not self._hearing:
                self._failure = ModelError(self._complaint())
                return
            with trio.move_on_at(min(self._transfer.wake_at(now), now + LOOK_EVERY_S)):
                await event.wait()

    def _complaint(self) -> str:
        orphan = self._unclaimed or self._transfer.orphan()
        what = f"{self._files.tensor_of(orphan)} and perhaps more" if orphan else "the rest"
        aside = "".join(f"; {self._lenders.name_of(p)} {why}" for p, why in self._aside.items())
        return (
            f"no node that can be reached gives {what} of {self._name}, of which "
            f"{self._left / (1 << 20):.1f} MiB are still to come{aside}"
        )

    async def _learn_digests(self, wanted: Sequence[Chunk]) -> None:
        """Find out what the chunks should be, a good deal ahead of their coming."""
        for batch in _batches(wanted):
            rest = batch
            while rest:
                while self._transfer.waiting > ENOUGH_WAITING:
                    await self._changed.event.wait()
                agreed = await self._agreed(rest)
                self._digests.update(agreed)
                self._transfer.want(agreed)
                rest = rest[len(agreed) :]
                self._changed.notify()
        self._learned = True
        self._changed.notify()

    async def _agreed(self, chunks: Sequence[Chunk]) -> dict[Chunk, bytes]:
        """The digests of the first of `chunks`, as many as somebody has together."""
        while True:
            event = self._changed.event
            witnesses, batch = self._witnesses(chunks)
            self._unclaimed = None if witnesses else chunks[0]
            answers: dict[str, tuple[bytes, ...]] = {}
            self._hearing += 1
            async with trio.open_nursery() as nursery:
                for peer in witnesses:
                    nursery.start_soon(self._witness, peer, batch, answers)
            self._hearing -= 1
            if answers:
                # In the order of the sources, not in that of their answers.
                ordered = {peer: answers[peer] for peer in witnesses if peer in answers}
                agreed, odd = agree(ordered)
                for peer in odd:
                    self._put_aside(peer, self._difference(batch, answers[peer], agreed))
                return dict(zip(batch, agreed, strict=True))
            with trio.move_on_after(LOOK_EVERY_S):
                await event.wait()

    def _witnesses(self, chunks: Sequence[Chunk]) -> tuple[list[str], Sequence[Chunk]]:
        """Sources that have the first of `chunks`, as many as one of them has, and those."""
        usable = {p: held for p, held in self._held.items() if p not in self._transfer.banned}
        known = {p: sum(1 for _ in takewhile(held, chunks)) for p, held in usable.items()}
        most = max(known.values(), default=0)
        able = [peer for peer, count in known.items() if count == most and most > 0]
        # In a draw the first is believed: what has not been changed for longest, or the leader.
        able.sort(key=lambda peer: usable[peer].changed.get(chunks[0].file, 0))
        return able[:WITNESSES], chunks[:most]

    async def _witness(
        self, peer: str, batch: Sequence[Chunk], answers: dict[str, tuple[bytes, ...]]
    ) -> None:
        which = self._which(batch[0].file)
        request = DigestsOf(which, tuple(chunk.number for chunk in batch))
        try:
            network = self._lenders.network
            answer = await network.call(peer, DIGESTS, request, timeout=DIGESTS_TIMEOUT_S)
        except NetworkError as error:
            log.info("%s has no digests: %s", self._lenders.name_of(peer), error)
            return
        found = answer.digests
        if len(found) != DIGEST_BYTES * len(batch):
            self._put_aside(peer, "told of other chunks than it was asked for")
            return
        places = range(0, len(found), DIGEST_BYTES)
        answers[peer] = tuple(found[place : place + DIGEST_BYTES] for place in places)

    def _difference(
        self, batch: Sequence[Chunk], said: Sequence[bytes], agreed: Sequence[bytes]
    ) -> str:
        chunk = next(c for c, one, other in zip(batch, said, agreed, strict=True) if one != other)
        return f"has other bytes in {self._files.tensor_of(chunk)} than other nodes"

    def _which(self, file: str) -> Which:
        return Which(self._name, self._label.fingerprint, self._label.mark, file)

    def _put_aside(self, peer: str, why: str) -> None:
        name = self._lenders.name_of(peer)
        log.error("%s %s; nothing of %s is fetched from it", name, why, self._name)
        self._aside[peer] = why
        self._transfer.ban(peer)

    async def _ask(self, ask: Ask) -> None:
        peer, size = ask.source, sum(chunk.size for chunk in ask.chunks)
        make = partial(_read_chunks, self._which(ask.chunks[0].file), ask.chunks)
        try:
            body, busy = await self._lenders.arrivals.ask(peer, READ_CHUNKS, make, size)
        except CallFailed as error:
            log.info("%s gave nothing: %s", self._lenders.name_of(peer), error)
            if error.code == NOT_HERE:
                self._transfer.lacked(ask)
            else:
                self._transfer.failed(ask, trio.current_time())
        except NetworkError as error:
            log.info("%s gave nothing: %s", self._lenders.name_of(peer), error)
            self._transfer.failed(ask, trio.current_time())
        else:
            self.came += size
            await self._take(ask, body, size, busy=busy)
        self._changed.notify()

    async def _take(self, ask: Ask, body: memoryview, size: int, *, busy: bool) -> None:
        try:
            spoiled = await trio.to_thread.run_sync(self._put, ask, body)
        except OSError as error:
            self._failure = disk_error(self._name, error)
            return
        if spoiled is not None:
            self._transfer.spoiled(ask)
            self._put_aside(ask.source, f"sent damaged bytes of {self._files.tensor_of(spoiled)}")
            return
        self._transfer.arrived(ask, busy=busy)
        for chunk in ask.chunks:
            del self._digests[chunk]
        self._left -= size
        done = 1 - self._left / self._total
        self._progress(done, f"fetching from {self._names()}")

    def _names(self) -> str:
        return ", ".join(sorted(map(self._lenders.name_of, self._transfer.sources)))

    def _put(self, ask: Ask, body: memoryview) -> Chunk | None:
        """Write what came, or return a chunk of it that is not what it should be. In a thread."""
        pieces, place = [], 0
        for chunk in ask.chunks:
            data = body[place : place + chunk.size]
            place += chunk.size
            if digest_of(data) != self._digests[chunk]:
                return chunk
            pieces.append((chunk, data, self._digests[chunk]))
        self._files.put(ask.chunks[0].file, pieces)
        return None


def _batches(wanted: Sequence[Chunk]) -> Iterator[Sequence[Chunk]]:
    for _, group in groupby(wanted, key=lambda chunk: chunk.file):
        chunks = list(group)
        for begin in range(0, len(chunks), MAX_DIGESTS):
            yield chunks[begin : begin + MAX_DIGESTS]


def _read_chunks(which: Which, chunks: Sequence[Chunk], number: int) -> ReadChunks:
    return ReadChunks(number, which, tuple(chunk.number for chunk in chunks))
