"""Keys and values in blocks, and the attention of a batch of rows over them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.torch.attention import CacheManners, Manner, attention, causal
from pxd.executors.torch.device import wait_for
from pxd.wire import Buffer

Shapes = Mapping[int, tuple[int, int, int]]
"""Of the keys and values of one position by layer: (heads, numbers, numbers)."""


def token_numbers(shapes: Shapes) -> int:
    """How many numbers one position takes in all layers."""
    return sum(heads * (keys + values) for heads, keys, values in shapes.values())


class KvPool:
    """`blocks` blocks of every layer; a position's slot is the same in all of them."""

    def __init__(
        self, shapes: Shapes, blocks: int, dtype: torch.dtype, device: torch.device
    ) -> None:
        """Memory of a CPU is taken as slots are written to."""
        slots = blocks * BLOCK_TOKENS
        self.device = device
        self.keys = {
            layer: torch.empty(slots, heads, numbers, dtype=dtype, device=device)
            for layer, (heads, numbers, _) in shapes.items()
        }
        self.values = {
            layer: torch.empty(slots, heads, numbers, dtype=dtype, device=device)
            for layer, (heads, _, numbers) in shapes.items()
        }

    @property
    def block_bytes(self) -> int:
        """Of one block in all layers."""
        tensors = [tensor for part in (self.keys, self.values) for tensor in part.values()]
        return sum(tensor[:1].nbytes for tensor in tensors) * BLOCK_TOKENS

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), as they all are before."""
        if not blocks:
            return
        sources, targets = torch.tensor(blocks, device=self.device).unbind(1)
        for part in (self.keys, self.values):
            for tensor in part.values():
                view = tensor.view(-1, BLOCK_TOKENS, *tensor.shape[1:])
                view[targets] = view[sources]

    def read(self, blocks: Sequence[int]) -> list[memoryview]:
        """The bytes of each block: keys of all layers, then values."""
        # What is pinned is copied without going through a buffer of the driver's.
        pinned, parts = self.device.type == "cuda", self._parts()
        widths = _widths(parts)
        found = [torch.empty(sum(widths), dtype=torch.uint8, pin_memory=pinned) for _ in blocks]
        for block, data in zip(blocks, found, strict=True):
            for part, place in zip(parts, data.split(widths), strict=True):
                place.copy_(part[block], non_blocking=True)
        wait_for(self.device)
        return [data.numpy().data for data in found]

    def write(self, blocks: Sequence[int], found: Sequence[Buffer]) -> None:
        """Fill blocks with what `read` has returned, or a copy of it that can be written to."""
        parts = self._parts()
        widths = _widths(parts)
        for block, body in zip(blocks, found, strict=True):
            data = torch.frombuffer(body, dtype=torch.uint8)
            for part, place in zip(parts, data.split(widths), strict=True):
                part[block].copy_(place)

    def _parts(self) -> list[torch.Tensor]:
        """Bytes ``(blocks, bytes)`` of the keys and then the values of every layer."""
        return [
            tensor.view(torch.uint8).view(len(tensor) // BLOCK_TOKENS, -1)
            for part in (self.keys, self.values)
            for tensor in part.values()
        ]


def _widths(parts: Sequence[torch.Tensor]) -> list[int]:
    return [part.shape[1] for part in parts]


@dataclass(frozen=True)
class Span:
    """Places [begin, end) of a batch: one row of a request that has `past` positions before it.
    `slots` ``(1, past + end - begin)`` are those of all its positions."""

    begin: int
    end: int
    past: int
    slots: torch.Tensor


class Rows(CacheManners):
    """Rows of a step over a pool: who they are and where their positions lie.

    `positions` ``(places,)`` says where each place of the batch is in its sequence. Rows of one
    position attend together, padded to the longest; the others one by one.
    """

    def __init__(self, pool: KvPool, rows: Sequence[tuple[int, int, Sequence[int]]]) -> None:
        """`rows` are (position, count, table of blocks)."""
        self._pool, device = pool, pool.device
        counts = np.array([count for _, count, _ in rows])
        begins = np.cumsum(counts) - counts
        lengths = np.array([position + count for position, count, _ in rows])
        positions = np.concatenate([np.arange(p, p + count) for p, count, _ in rows])
        tables = np.zeros((len(rows), max(len(table) for _, _, table in rows)), np.int64)
        for row, (_, _, table) in enumerate(rows):
            tables[row, : len(table)] = table
        owners = np.repeat(np.arange(len(rows)), counts)
        written = tables[owners, positions // BLOCK_TOKENS] * BLOCK_TOKENS
        self.positions = torch.from_numpy(positions).to(device)
        self._written = torch.from_numpy(written + positions % BLOCK_TOKENS).to(device)
        self._spans = [
            Span(begin, begin + count, position, self._slots(tables[row : row + 1], [length]))
            for row, ((position, count, _), begin, length) in enumerate(
                zip(rows, begins.tolist(), lengths.tolist(), strict=True)
            )
            if count > 1
        ]
        self._single = single = np.flatnonzero(counts == 1)
        self._places = torch.from_numpy(begins[single]).to(device)
        self._lasts = torch.from_numpy(lengths[single] - 1).to(device)[:, None]
        if single.size:
            self._single_slots = self._slots(tables[single], lengths[single])

    def _slots(self, tables: Any, lengths: Any) -> torch.Tensor:
        """``(rows, longest)``; what is behind a row's end repeats its first slot, for a slot
        without a number could be anything."""
        longest = max(lengths)
        blocks = torch.from_numpy(tables[:, : -(-longest // BLOCK_TOKENS)]).to(self._pool.device)
        place = torch.arange(longest, device=self._pool.device)
        slots = blocks[:, place // BLOCK_TOKENS] * BLOCK_TOKENS + place % BLOCK_TOKENS
        if len(lengths) == 1:
            return slots
        ends = torch.as_tensor(lengths, device=self._pool.device)[:, None]
        return torch.where(place < ends, slots, slots[:, :1])

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layer: int, *_args: Any, **_kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._pool.keys[layer][self._written] = keys[0].transpose(0, 1)
        self._pool.values[layer][self._written] = values[0].transpose(0, 1)
        return keys, values

    def attend(self, layer: int, queries: torch.Tensor, manner: Manner) -> torch.Tensor:
        queries = queries[0].transpose(0, 1)
        parts: list[tuple[torch.Tensor | slice, torch.Tensor]] = []
        if self._single.size:
            # Where all places are such rows, there is nothing to pick.
            own = queries if self._single.size == len(queries) else queries[self._places]
            kept = self._kept(layer, self._single_slots, manner)
            found = attention(own[:, :, None], *kept, manner, self._lasts)
            parts.append((self._places, found[:, :, 0]))
        for span in self._spans:
            where = slice(span.begin, span.end)
            own = queries[where].transpose(0, 1)[None]
            kept = self._kept(layer, span.slots, manner)
            if span.past:
                found = attention(own, *kept, manner, self.positions[None, where])
            else:
                found = causal(own, *kept, manner)
            parts.append((where, found[0].transpose(0, 1)))
        if len(parts) == 1:
            return parts[0][1]
        out = queries.new_empty(*queries.shape[:2], parts[0][1].shape[-1])
        for place, found in parts:
            out[place] = found
        return out

    def _kept(
        self, layer: int, slots: torch.Tensor, manner: Manner
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Keys and values of slots ``(rows, m)``, as attention wants them."""
        keys, values = self._pool.keys[layer], self._pool.values[layer]
        return manner.expanded(_taken(keys, slots), _taken(values, slots))


def _taken(numbers: torch.Tensor, slots: torch.Tensor) -> torch.Tensor:
    """``(rows, heads, m, numbers)``."""
    found = numbers.index_select(0, slots.flatten())
    return found.view(*slots.shape, *numbers.shape[1:]).transpose(1, 2)
