"""The second KV tier: blocks that the stages keep in slower storage, to be loaded instead of
computed again.

The head decides, the stages copy, each its own layers' part of a block. Every stage has the same
slots. A copy is one event, done when all stages have reported it; until then its blocks and its
slots are held. After vLLM's simple CPU offload scheduler.
"""

from collections import OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from typing import Literal

import msgspec

from pxd.engine.blocks import BlockPool
from pxd.engine.hashing import BlockHash
from pxd.wire import Copy

StoreWhen = Literal["eager", "lazy"]
"""Eager: as soon as a block is full. Lazy: when nobody uses it and it is about to be given away,
which writes less and keeps only what would be lost."""


class Part(msgspec.Struct, frozen=True):
    """What a load does for one request: `blocks`, its own from `place` on, filled from `slots`."""

    request: int
    place: int
    blocks: tuple[int, ...]
    slots: tuple[int, ...]


class _Event:
    """A copy under way. A store has `names`, a load has `parts`; `waiting` are stages."""

    __slots__ = ("copy", "failed", "names", "parts", "waiting")

    def __init__(self, copy: Copy, names: Sequence[BlockHash], parts: Sequence[Part]) -> None:
        self.copy = copy
        self.names, self.parts = names, parts
        self.waiting: set[int] = set()
        self.failed: set[int] = set()


class Tier:
    """`slots` slots on each of `stages` stages, for the blocks of `device`.

    A slot that a stage could not write or read is not used again. With no slots, nothing is done.
    """

    def __init__(
        self, device: BlockPool, *, slots: int = 0, stages: int = 1, store: StoreWhen = "lazy"
    ) -> None:
        self.slots = BlockPool(slots)
        self._device = device
        self._stages = range(stages)
        self._eager = store == "eager"
        self._full: OrderedDict[BlockHash, None] = OrderedDict()
        self._storing: set[BlockHash] = set()
        # What was stored since it was last used. If a small tier has given it up by now, or it
        # could not be stored, trying again would go on for ever.
        self._offered: set[BlockHash] = set()
        self._events: dict[int, _Event] = {}
        self._lost: list[_Event] = []
        self._retired: set[int] = set()
        self._next_event = 0

    @property
    def copying(self) -> bool:
        """Whether blocks are held that will come back when a copy is done."""
        return bool(self._events or self._lost)

    @property
    def oldest(self) -> int | None:
        """The event that was sent first of those that are not done."""
        return next(iter(self._events), None)

    @property
    def retired(self) -> int:
        """Slots that are not used any more. They count as used in `slots`."""
        return len(self._retired)

    def filled(self, names: Iterable[BlockHash]) -> None:
        """Blocks of the device have been registered under these names."""
        if self._eager and self.slots.capacity:
            self._full.update(dict.fromkeys(names))
            while len(self._full) > self._device.capacity:
                self._full.popitem(last=False)

    def touch(self, names: Iterable[BlockHash]) -> None:
        """Somebody uses these; the others go first when slots run out."""
        known = (self.slots.block_of(name) for name in names)
        used = [slot for slot in known if slot is not None]
        for slot in used:
            self.slots.hold(slot)
        self.slots.drop(used)

    def find(self, names: Iterable[BlockHash]) -> list[int]:
        """The slots of the longest prefix of `names` that can be loaded."""
        return self.slots.find(names)

    def store(self, limit: int) -> Copy | None:
        """What to store with the next step; to be called before blocks are given to anybody.

        At most `limit` blocks are on their way at a time. Lazy: as many are looked at, from the
        end from which they are given away.
        """
        room = min(limit - len(self._storing), self.slots.free)
        chosen: dict[BlockHash, int] = {}
        if room > 0:
            for name, block in self._candidates(limit - len(self._storing)):
                chosen[name] = block
                if len(chosen) == room:
                    break
        if not chosen:
            return None
        blocks, names = tuple(chosen.values()), tuple(chosen)
        slots = tuple(self.slots.allocate(len(blocks)))
        for block in blocks:
            self._device.hold(block)
        self._storing.update(names)
        return self._send(_Event(Copy(0, blocks, slots), names, ()))

    def load(self, parts: Sequence[Part]) -> Copy:
        """Fill blocks, which somebody holds, from slots that `find` has returned."""
        blocks = tuple(block for part in parts for block in part.blocks)
        slots = tuple(slot for part in parts for slot in part.slots)
        for block in blocks:
            self._device.hold(block)
        for slot in slots:
            self.slots.hold(slot)
        return self._send(_Event(Copy(0, blocks, slots), (), parts))

    def loads_under_way(self) -> int:
        """Blocks that are being loaded."""
        return sum(len(e.copy.blocks) for e in self._all() if not e.names)

    def done(self, event: int, stage: int, failed: Iterable[int]) -> list[tuple[Part, bool]]:
        """A stage has reported. Returns the parts of a load that is done, and whether it worked."""
        entry = self._events.get(event)
        if entry is None or stage not in entry.waiting:
            return []
        entry.waiting.discard(stage)
        entry.failed.update(set(failed).intersection(entry.copy.slots))
        if entry.waiting:
            return []
        del self._events[event]
        if entry.names:
            self._stored(entry)
            return []
        self._device.drop(entry.copy.blocks)
        if not entry.parts:
            # Sent again for those who had gone by then, which some stages call a failure.
            entry.failed.clear()
        self._let_go(entry)
        return [(part, entry.failed.isdisjoint(part.slots)) for part in entry.parts]

    def lost(self, copy: Copy | None) -> list[Part]:
        """Some stages may not have heard of a copy: `again` will tell them. Returns whose it was.

        A stage copies in order, so one that has done it already has finished when it has again.
        """
        entry = self._events.pop(copy.event, None) if copy is not None else None
        if entry is None:
            return []
        parts, entry.parts = entry.parts, ()
        self._lost.append(entry)
        return list(parts)

    def again(self, kind: Literal["store", "load"]) -> Copy | None:
        """A copy that was lost and is to be sent with the next step."""
        entry = next((e for e in self._lost if bool(e.names) == (kind == "store")), None)
        if entry is None:
            return None
        self._lost.remove(entry)
        return self._send(entry)

    def _all(self) -> Iterator[_Event]:
        yield from self._events.values()
        yield from self._lost

    def _send(self, entry: _Event) -> Copy:
        entry.copy = msgspec.structs.replace(entry.copy, event=self._next_event)
        entry.waiting = set(self._stages)
        self._events[self._next_event] = entry
        self._next_event += 1
        return entry.copy

    def _candidates(self, window: int) -> Iterator[tuple[BlockHash, int]]:
        if not self._eager:
            near = {name: block for block, name in self._device.next_out(window)}
            self._offered.intersection_update({*near, *self._storing})
            for name, block in near.items():
                if name not in self._offered and self.slots.block_of(name) is None:
                    self._offered.add(name)
                    yield name, block
            return
        while self._full:
            name, _ = self._full.popitem(last=False)
            self.touch([name])
            at = self._device.block_of(name)
            known = name in self._storing or self.slots.block_of(name) is not None
            if at is not None and not known:
                yield name, at

    def _stored(self, entry: _Event) -> None:
        for slot, name in zip(entry.copy.slots, entry.names, strict=True):
            self._storing.discard(name)
            if slot not in entry.failed:
                self.slots.register(slot, name)
        self._let_go(entry)
        # Those that were stored lazily go on being the next to be given away.
        self._device.drop(entry.copy.blocks, soon=not self._eager)

    def _let_go(self, entry: _Event) -> None:
        """Drop the event's slots; those that failed are held for good."""
        fine = []
        for slot in entry.copy.slots:
            if slot in entry.failed and slot not in self._retired:
                self.slots.forget(slot)
                self._retired.add(slot)
            else:
                fine.append(slot)
        self.slots.drop(fine)
