"""The passes of a step through SGLang's model runner: which positions run together, and how.

SGLang either extends sequences by several positions, for which it computes the logits of the last
one alone, or decodes one position of each. So what only fills is extended, and every position that
draws is decoded: alone, behind a prompt or among guesses, its logits come from the same kernels.

One request may have several positions in a pass that decodes. In every layer keys and values are
written before any position attends, and each attends just up to itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import msgspec
import numpy as np
from numpy.typing import NDArray

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.wire import Row

MOST_ENTRIES = 128
"""Of a pass; each takes a row of SGLang's table of slots, as wide as the model's context."""

Numbers = NDArray[np.int64]


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """Positions [position, position + count) of a request whose blocks are `table`."""

    position: int
    count: int
    table: tuple[int, ...]


class Pass(msgspec.Struct, frozen=True, array_like=True):
    """`places` are those of the entries' positions in the step's tensor, in order."""

    decodes: bool
    entries: tuple[Entry, ...]
    places: tuple[int, ...]


def passes_of(
    rows: Sequence[Row], tables: Sequence[Sequence[int]], most: int = MOST_ENTRIES
) -> list[Pass]:
    """The passes of a step, to be run in this order, of at most `most` entries each; `tables` has
    the blocks of each row."""
    fills: dict[int, tuple[Entry, list[int]]] = {}
    decodes: list[tuple[Entry, list[int]]] = []
    begin = 0
    for row, table in zip(rows, tables, strict=True):
        blocks, filled, end = tuple(table), row.count - row.draws, begin + row.count
        if filled:
            places = list(range(begin, begin + filled))
            # A request's rows lie one behind the other.
            if row.request in fills:
                entry, before = fills[row.request]
                entry = Entry(entry.position, entry.count + filled, blocks)
                fills[row.request] = entry, [*before, *places]
            else:
                fills[row.request] = Entry(row.position, filled, blocks), places
        for place in range(begin + filled, end):
            decodes.append((Entry(row.position + place - begin, 1, blocks), [place]))
        begin = end
    return [*_packed(list(fills.values()), False, most), *_packed(decodes, True, most)]


def _packed(parts: Sequence[tuple[Entry, list[int]]], decodes: bool, most: int) -> list[Pass]:
    passes = []
    for first in range(0, len(parts), most):
        some = parts[first : first + most]
        entries = tuple(entry for entry, _ in some)
        places = tuple(place for _, those in some for place in those)
        passes.append(Pass(decodes, entries, places))
    return passes


@dataclass(frozen=True)
class Layout:
    """Where the entries of a pass begin and end, and in which slots of KV they lie.

    SGLang keeps its first page for padding, so block b is page b + 1. `tables` ``(entries, pages)``
    has the pages of each entry up to its last position, then zeros; `slots` has one for each
    position that is computed.
    """

    begins: Numbers
    counts: Numbers
    ends: Numbers
    tables: Numbers
    slots: Numbers


def layout_of(entries: Sequence[Entry]) -> Layout:
    begins = np.array([entry.position for entry in entries], np.int64)
    counts = np.array([entry.count for entry in entries], np.int64)
    ends = begins + counts
    pages = -(-ends // BLOCK_TOKENS)
    tables = np.zeros((len(entries), int(pages.max())), np.int64)
    for row, (entry, count) in enumerate(zip(entries, pages.tolist(), strict=True)):
        tables[row, :count] = entry.table[:count]
        tables[row, :count] += 1
    positions = np.concatenate([np.arange(b, e) for b, e in zip(begins, ends, strict=True)])
    owners = np.repeat(np.arange(len(entries)), counts)
    slots = tables[owners, positions // BLOCK_TOKENS] * BLOCK_TOKENS + positions % BLOCK_TOKENS
    return Layout(begins, counts, ends, tables, slots)
