"""The stage's side of the second KV tier: blocks of KV as bytes, and back.

Copies begin with the step that says so; the bytes of a store are taken at once, those of a load are
put in place before the first step that comes after they are there.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Generic, Protocol, TypeVar, cast

from pxd import hardware
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.memory import RESERVE
from pxd.executors.protocol import LoadSpec
from pxd.executors.slots import Copier, Report, SlotFile, Wanted
from pxd.wire import Buffer, Copied, Copy, Step

log = logging.getLogger("pxd.executors")


class Holder(Protocol):
    """An open request that has `length` positions."""

    number: int
    length: int


RequestT = TypeVar("RequestT", bound=Holder)


class KvBlocks(Protocol[RequestT]):
    """An engine's KV in blocks, each of `block_bytes` bytes."""

    block_bytes: int

    def owners(self, blocks: Sequence[int]) -> Sequence[tuple[RequestT | None, int]]:
        """The open request that each block belongs to, and the block's place in it."""

    def read(self, blocks: Sequence[int]) -> Sequence[Buffer | None]:
        """What is in each block; None for one that is not here, or not full."""

    def write(self, request: RequestT, place: int, data: Sequence[Buffer]) -> None:
        """Fill the request's blocks from `place` on, which is where its positions end."""


def open_tier(
    spec: LoadSpec,
    blocks: KvBlocks[RequestT],
    requests: Mapping[int, RequestT],
    report: Report,
    *,
    own_memory: bool,
) -> "Tier[RequestT] | None":
    """The tier that `spec` allows for, or None with a word in the log why there is none.

    `requests` is the engine's own table. With `own_memory` the device does not share the memory of
    the host, which then keeps the tier.
    """
    size = spec.tier_bytes
    if own_memory:
        size = min(size, max(0, hardware.memory_available() - RESERVE))
    slots = size // blocks.block_bytes if blocks.block_bytes else 0
    if not slots:
        log.warning("no KV tier: %d bytes do not hold one block", size)
        return None
    if size < spec.tier_bytes:
        log.warning("the KV tier gets %d bytes: the host has no more memory", size)
    try:
        if own_memory:
            file = SlotFile.in_memory(blocks.block_bytes)
        else:
            file = SlotFile.on_disk(Path(spec.tier_directory), blocks.block_bytes)
    except OSError as error:
        log.warning("no KV tier: %s", error)
        return None
    return Tier(slots, blocks, Copier(file, report), requests)


class Tier(Generic[RequestT]):
    """To be called in the engine's thread."""

    def __init__(
        self,
        slots: int,
        blocks: KvBlocks[RequestT],
        copier: Copier,
        requests: Mapping[int, RequestT],
    ) -> None:
        self.slots = slots
        self._blocks = blocks
        self._copier = copier
        self._requests = requests

    @property
    def memory_bytes(self) -> int:
        """Of the host's memory, besides what is resident."""
        return self._copier.memory_bytes

    def store(self, step: Step, copy: Copy) -> None:
        found, failed = [], []
        for slot, data in zip(copy.slots, self._blocks.read(copy.blocks), strict=True):
            if data is not None and slot < self.slots:
                found.append((slot, data))
            else:
                failed.append(slot)
        self._copier.store(_report_of(step, copy, failed), found)

    def load(self, step: Step, copy: Copy) -> None:
        """Read for those requests whose next blocks these are."""
        places: dict[int, list[tuple[int, int]]] = {}
        failed = []
        owners = self._blocks.owners(copy.blocks)
        for (request, place), slot in zip(owners, copy.slots, strict=True):
            if request is None or slot >= self.slots:
                failed.append(slot)
            else:
                places.setdefault(request.number, []).append((place, slot))
        wanted = []
        for number, pairs in places.items():
            request, first = self._requests[number], pairs[0][0]
            slots = tuple(slot for _, slot in pairs)
            in_order = [place for place, _ in pairs] == list(range(first, first + len(pairs)))
            if in_order and request.length == first * BLOCK_TOKENS:
                wanted.append(Wanted(request, first, slots))
            else:
                failed += slots
        self._copier.load(_report_of(step, copy, failed), wanted)

    def put_in_place(self) -> None:
        """Hand what has been loaded to those requests that are still here and still want it."""
        for loaded in self._copier.loaded():
            request, place = cast(RequestT, loaded.wanted.owner), loaded.wanted.place
            if self._requests.get(request.number) is not request:
                continue
            if request.length == place * BLOCK_TOKENS:
                self._blocks.write(request, place, loaded.data)
                request.length += len(loaded.data) * BLOCK_TOKENS

    def forget(self) -> None:
        self._copier.forget()


def _report_of(step: Step, copy: Copy, failed: Sequence[int]) -> Copied:
    return Copied(
        pipeline=step.pipeline, session=step.session, event=copy.event, failed=tuple(failed)
    )
