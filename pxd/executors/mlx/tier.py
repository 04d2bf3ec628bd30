"""The stage's side of the second KV tier: blocks of KV caches as bytes, and back.

Copies begin with the step that says so; the bytes of a store are taken at once, those of a load are
put in place before the first step that comes after they are there.
"""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import mlx.core as mx

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.mlx.batch import Request, own_caches
from pxd.executors.mlx.measure import has_own_memory
from pxd.executors.mlx.prefixes import PrefixStore
from pxd.executors.mlx.stage import Caches
from pxd.executors.mlx.tensors import dtype_of, from_wire, to_wire
from pxd.executors.protocol import LoadSpec
from pxd.executors.slots import Copier, Report, SlotFile, Wanted
from pxd.wire import Buffer, Copied, Copy, Step, Tensor

log = logging.getLogger("pxd.executors.mlx")


class Layout:
    """What the bytes of one block are: keys and values of one cache behind the other."""

    def __init__(self, caches: Caches) -> None:
        """`caches` have been used; raises `TypeError` for types that have no name on the wire."""
        self.parts = [
            Tensor(dtype_of(array), (1, array.shape[1], BLOCK_TOKENS, array.shape[3]))
            for cache in caches
            for array in (cache.keys, cache.values)
        ]
        self.nbytes = sum(part.nbytes for part in self.parts)

    def arrays(self, blocks: Sequence[Buffer]) -> list[mx.array]:
        """Keys and values by turns, of blocks one behind the other."""
        arrays, begin = [], 0
        for part in self.parts:
            end = begin + part.nbytes
            pieces = [from_wire(part, memoryview(block)[begin:end]) for block in blocks]
            arrays.append(mx.concatenate(pieces, axis=2))
            begin = end
        return arrays


def open_tier(
    spec: LoadSpec,
    used_caches: Caches,
    prefixes: PrefixStore,
    requests: Mapping[int, Request],
    report: Report,
) -> "Tier | None":
    """The tier that `spec` allows for, or None with a word in the log why there is none."""
    try:
        layout = Layout(used_caches)
        slots = spec.tier_bytes // layout.nbytes if layout.nbytes else 0
        if not slots:
            log.warning("no KV tier: %d bytes do not hold one block", spec.tier_bytes)
            return None
        if has_own_memory():
            file = SlotFile.in_memory(layout.nbytes)
        else:
            file = SlotFile.on_disk(Path(spec.tier_directory), layout.nbytes)
    except (OSError, TypeError) as error:
        log.warning("no KV tier: %s", error)
        return None
    return Tier(layout, slots, Copier(file, report), prefixes, requests)


class Tier:
    """`requests` is the engine's own table. To be called in the engine's thread."""

    def __init__(
        self,
        layout: Layout,
        slots: int,
        copier: Copier,
        prefixes: PrefixStore,
        requests: Mapping[int, Request],
    ) -> None:
        self.slots = slots
        self._layout = layout
        self._copier = copier
        self._prefixes = prefixes
        self._requests = requests

    def store(self, step: Step, copy: Copy) -> None:
        blocks = self._prefixes.blocks(copy.blocks)
        mx.eval(blocks)
        found, failed = [], []
        for slot, arrays in zip(copy.slots, blocks, strict=True):
            if arrays and slot < self.slots:
                found.append((slot, b"".join(to_wire(array)[1] for array in arrays)))
            else:
                failed.append(slot)
        self._copier.store(_report_of(step, copy, failed), found)

    def load(self, step: Step, copy: Copy) -> None:
        """Read for those requests whose next blocks these are."""
        places: dict[int, list[tuple[int, int]]] = {}
        failed = []
        owners = self._prefixes.owners(copy.blocks)
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
        """Append what has been loaded to the caches of those requests that are still here."""
        for loaded in self._copier.loaded():
            request = cast(Request, loaded.wanted.owner)
            if self._requests.get(request.number) is not request:
                continue
            arrays = self._layout.arrays(loaded.data)
            caches = own_caches(request)
            for cache, keys, values in zip(caches, arrays[::2], arrays[1::2], strict=True):
                cache.update_and_fetch(keys, values)
            mx.eval([cache.state for cache in caches])
            request.length += len(loaded.data) * BLOCK_TOKENS

    def forget(self) -> None:
        self._copier.forget()


def _report_of(step: Step, copy: Copy, failed: Sequence[int]) -> Copied:
    return Copied(
        pipeline=step.pipeline, session=step.session, event=copy.event, failed=tuple(failed)
    )
