"""The engine over stages with paged KV, on a stage whose model can be computed in one's head.

A position's hidden state is the sum of all tokens up to it, as far as they are found in the blocks
of its request; the token that follows is that sum, modulo the vocabulary.
"""

import logging
import mmap
import queue
import sys
import threading
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
import torch

from pxd import hardware
from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.memory import RESERVE
from pxd.executors.paged import PagedEngine
from pxd.executors.protocol import ExecutorError, LoadSpec, StepRejected
from pxd.executors.torch.tensors import from_wire
from pxd.wire import Buffer, Copied, Copy, Grant, Opening, Row, Sampling, Step, Tensor

VOCABULARY, CONTEXT, BLOCKS = 50, 3 * BLOCK_TOKENS, 6
GREEDY = Sampling(temperature=0)
PATIENCE_S = 60.0


class Adding:
    first, layers, hidden_size, vocabulary, context = True, 1, 1, VOCABULARY, CONTEXT
    dtype, weight_bytes, blocks = torch.float32, 100, BLOCKS

    def __init__(self, last: bool = True) -> None:
        self.last = last
        self.slots = torch.full((BLOCKS, BLOCK_TOKENS), torch.nan)
        self.error: Exception | None = None

    def forward(
        self, rows: Sequence[Row], tables: Sequence[Sequence[int]], tensor: Tensor, body: Buffer
    ) -> torch.Tensor:
        if self.error is not None:
            raise self.error
        tokens, begin, sums, drawn = from_wire(tensor, body, torch.device("cpu")), 0, [], []
        for row, table in zip(rows, tables, strict=True):
            for place in range(row.count):
                block, offset = divmod(row.position + place, BLOCK_TOKENS)
                self.slots[table[block], offset] = tokens[begin + place]
                seen = self.slots[list(table)].flatten()[: row.position + place + 1]
                sums.append(seen.sum())
            drawn += range(begin + row.count - row.draws, begin + row.count)
            begin += row.count
        hidden = torch.stack(sums)[:, None]
        if not self.last:
            return hidden
        logits = torch.zeros(len(drawn), VOCABULARY)
        for row, place in enumerate(drawn):
            value = hidden[place, 0]
            if value.isfinite():
                logits[row, int(value) % VOCABULARY] = 1
            else:
                logits[row] = torch.nan
        return logits

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        sources, targets = zip(*blocks, strict=True)
        self.slots[list(targets)] = self.slots[list(sources)]

    def active_bytes(self, used_blocks: int) -> int:
        return self.weight_bytes + 10 * used_blocks


class Giving(Adding):
    """Its blocks can go to a second tier, in the memory of the host."""

    block_bytes, own_memory = 4 * BLOCK_TOKENS, True

    def read(self, blocks: Sequence[int]) -> list[bytes]:
        return [self.slots[block].numpy().tobytes() for block in blocks]

    def write(self, blocks: Sequence[int], data: Sequence[Buffer]) -> None:
        for block, body in zip(blocks, data, strict=True):
            self.slots[block] = torch.frombuffer(body, dtype=torch.float32)


class Driven:
    """An engine with its stage, and steps for it. No copy follows a report before `may_go_on`."""

    def __init__(self, last: bool = True, make: type[Adding] = Adding, tier_bytes: int = 0) -> None:
        self.stage = make(last)
        self.copied: queue.SimpleQueue[Copied] = queue.SimpleQueue()
        self.may_go_on = threading.Event()
        self.may_go_on.set()
        self.engine = PagedEngine(lambda *_: self.stage, logging.getLogger("test"), self.report)
        spec = LoadSpec(path="", start=0, end=1, tier_bytes=tier_bytes)
        self.info = self.engine.load(spec, lambda _: None)

    def report(self, word: Copied) -> None:
        self.copied.put(word)
        assert self.may_go_on.wait(PATIENCE_S)

    def reported(self) -> tuple[int, tuple[int, ...]]:
        """The event that is done next, and the slots that failed."""
        word = self.copied.get(timeout=PATIENCE_S)
        return word.event, word.failed

    def step(self, rows: Sequence[tuple[int, int, Sequence[int], int]], **more: Any) -> Any:
        """Run rows of (request, position, tokens, draws)."""
        tokens = [token for row in rows for token in row[2]]
        step = Step(
            pipeline="p",
            session=more.pop("session", 0),
            step=0,
            rows=tuple(Row(r, p, len(some), draws) for r, p, some, draws in rows),
            tensor=Tensor("i32", (len(tokens),)),
            **more,
        )
        return self.engine.step(step, torch.tensor(tokens, dtype=torch.int32).numpy().tobytes())

    def refused(self, *args: Any, **more: Any) -> StepRejected:
        with pytest.raises(StepRejected) as caught:
            self.step(*args, **more)
        return caught.value


def opened(request: int, *blocks: int, **more: Any) -> dict[str, Any]:
    return {
        "openings": (Opening(request, GREEDY, **more),),
        "grants": (Grant(request, blocks),),
    }


def test_what_is_drawn_follows_from_all_positions_before() -> None:
    driven = Driven()
    assert (driven.info.kv_tokens, driven.info.trims) == (BLOCKS * BLOCK_TOKENS, True)
    assert driven.step([(1, 0, [1] * 70, 0)], **opened(1, 4, 0)) == ()
    assert driven.step([(1, 70, [3, 5], 2)]) == (23, 28)
    # The second was a guess, and wrong.
    assert driven.step([(1, 71, [7], 1)]) == (30,)
    assert driven.refused([(1, 71, [7], 1)]).code == "bad-step"


def test_a_prefix_stays_where_it_is_or_is_copied() -> None:
    driven = Driven()
    driven.step([(1, 0, [1] * 70, 1)], **opened(1, 4, 0))
    begins = {"cached": BLOCK_TOKENS, "hits": (4,)}
    assert driven.step([(2, 64, [2], 1)], **opened(2, 3, 5, **begins)) == (66 % VOCABULARY,)
    stays = opened(3, 4, 2, **begins)
    assert driven.step([(3, 64, [4], 1)], releases=(1,), **stays) == (68 % VOCABULARY,)
    memory = driven.engine.memory()
    assert (memory.requests, memory.held, memory.kept) == (2, 4, 1)
    assert memory.active == 100 + 10 * 4
    assert driven.refused([(5, 64, [1], 1)], **opened(5, 0, 1, cached=64, hits=(0,))).requests == (
        5,
    )


def test_what_is_longer_than_the_context_is_refused() -> None:
    driven = Driven()
    driven.step([(1, 0, [1] * CONTEXT, 0)], **opened(1, 0, 1, 2, 3))
    error = driven.refused([(1, CONTEXT, [1], 1)])
    assert (error.code, error.requests) == ("bad-step", (1,))
    assert f"context of {CONTEXT}" in error.reason


@pytest.mark.parametrize(
    ("error", "code"),
    [
        (MemoryError(), "out-of-memory"),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"), "out-of-memory"),
        (RuntimeError("shapes do not match"), "executor-failed"),
    ],
)
def test_a_step_that_fails_loses_those_that_took_part(error: Exception, code: str) -> None:
    driven = Driven()
    driven.step([(1, 0, [1] * 64, 0)], **opened(1, 0, 1))
    driven.step([(2, 0, [1], 0)], **opened(2, 2))
    driven.stage.error = error
    caught = driven.refused([(1, 64, [1], 1)])
    assert (caught.code, caught.requests) == (code, (1,))
    driven.stage.error = None
    assert driven.engine.memory().requests == 1
    # Nobody may begin with what was in its blocks.
    again = opened(3, 4, 5, cached=64, hits=(0,))
    assert driven.refused([(3, 64, [1], 1)], **again).code == "bad-step"
    assert driven.step([(2, 1, [4], 1)]) == (5,)


@pytest.mark.parametrize("last", [True, False])
def test_what_is_not_finite_is_told_by_request(last: bool) -> None:
    driven = Driven(last)
    driven.step([(1, 0, [1], 0)], **opened(1, 0))
    driven.step([(2, 0, [1], 0)], **opened(2, 2))
    driven.stage.slots[2, 0] = torch.inf
    caught = driven.refused([(1, 1, [1], 1), (2, 1, [1], 1)])
    assert caught.code == "not-finite"
    assert "requests (2,) are not finite" in caught.reason


def test_another_session_begins_with_nothing() -> None:
    driven = Driven()
    driven.step([(1, 0, [1] * 64, 0)], **opened(1, 0))
    assert driven.refused([(1, 64, [1], 1)], session=1).code == "unknown-request"
    memory = driven.engine.memory()
    assert (memory.requests, memory.held, memory.kept) == (0, 0, 0)


def test_nothing_is_loaded_twice() -> None:
    driven = Driven()
    with pytest.raises(ExecutorError, match="holds a stage already"):
        driven.engine.load(LoadSpec(path="", start=0, end=1), lambda _: None)


in_memory = pytest.mark.skipif(sys.platform != "linux", reason="memory as a file is Linux's")


@in_memory
def test_a_block_goes_to_the_memory_of_the_host_and_comes_back(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(psutil.Process, "memory_info", lambda _: SimpleNamespace(rss=1000))
    driven = Driven(make=Giving, tier_bytes=1 << 20)
    assert driven.info.tier_slots == (1 << 20) // Giving.block_bytes
    driven.step([(1, 0, [1] * 70, 0)], **opened(1, 4, 0))
    assert driven.engine.memory().resident == 1000
    # The second block is not full.
    driven.step([], store=Copy(7, (4, 0), (2, 3)))
    assert driven.reported() == (7, (3,))
    assert driven.engine.memory().resident == 1000 + mmap.PAGESIZE
    driven.stage.slots[:] = torch.nan
    driven.step([], releases=(1,), load=Copy(8, (5,), (2,)), **opened(2, 5, 3))
    assert driven.reported() == (8, ())
    assert driven.step([(2, 64, [3], 1)]) == (67 % VOCABULARY,)
    # Others may begin with it, too.
    begun = opened(3, 1, 2, cached=BLOCK_TOKENS, hits=(5,))
    assert driven.step([(3, 64, [4], 1)], **begun) == (68 % VOCABULARY,)


@in_memory
def test_a_load_that_is_sent_twice_is_put_in_place_once() -> None:
    driven = Driven(make=Giving, tier_bytes=1 << 20)
    driven.step([(1, 0, [1] * 64, 0)], **opened(1, 4))
    driven.may_go_on.clear()
    driven.step([], store=Copy(0, (4,), (0,)))
    driven.step([], load=Copy(1, (5,), (0,)), **opened(2, 5, 3))
    driven.step([], load=Copy(2, (5,), (0,)))
    driven.may_go_on.set()
    assert [driven.reported() for _ in range(3)] == [(0, ()), (1, ()), (2, ())]
    assert driven.step([(2, 64, [3], 1)]) == (67 % VOCABULARY,)


@in_memory
def test_a_tier_is_no_larger_than_the_memory_that_is_free(monkeypatch: pytest.MonkeyPatch) -> None:
    room = 3 * Giving.block_bytes + 1
    monkeypatch.setattr(hardware, "memory_available", lambda: RESERVE + room)
    assert Driven(make=Giving, tier_bytes=1 << 20).info.tier_slots == 3
    monkeypatch.setattr(hardware, "memory_available", lambda: RESERVE - 1)
    assert Driven(make=Giving, tier_bytes=1 << 20).info.tier_slots == 0


def test_a_stage_that_does_not_give_its_blocks_has_no_tier() -> None:
    driven = Driven(tier_bytes=1 << 20)
    assert driven.info.tier_slots == 0
    error = driven.refused([], store=Copy(0, (0,), (0,)))
    assert "no second KV tier" in error.reason
