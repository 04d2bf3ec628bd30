"""An engine over a stage that stores KV by the head's block numbers: the requests of a stage, their
tables of blocks, and the running of steps. How layers are run is for the stage to know."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import psutil
import torch

from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.engine.sampling import Sampler
from pxd.engine.tables import BlockTables, TableError
from pxd.executors.protocol import (
    ExecutorError,
    LoadSpec,
    MemoryReport,
    Progress,
    StageInfo,
    StepOutput,
    StepRejected,
)
from pxd.executors.rows import (
    check_copies,
    check_guesses,
    check_hidden,
    check_output,
    check_rows,
    check_tokens,
    draws_of,
    requests_of,
)
from pxd.executors.slots import Report
from pxd.executors.tier import Tier, open_tier
from pxd.executors.torch.decode import draw
from pxd.executors.torch.tensors import to_wire
from pxd.executors.trouble import NotFinite, code_of
from pxd.wire import Buffer, Coding, Row, Step, Tensor


class PagedStage(Protocol):
    """Loaded layers, with `blocks` blocks of KV. `context` is the longest sequence that it runs."""

    first: bool
    last: bool
    layers: int
    hidden_size: int
    vocabulary: int
    context: int
    dtype: torch.dtype
    weight_bytes: int
    blocks: int

    def forward(
        self, rows: Sequence[Row], tables: Sequence[Sequence[int]], tensor: Tensor, body: Buffer
    ) -> torch.Tensor:
        """Run rows whose blocks are `tables`.

        Returns hidden states ``(positions, hidden)``, or on the last stage logits
        ``(draws, vocabulary)`` in the order of `draws_of`.
        """

    def copy(self, blocks: Sequence[tuple[int, int]]) -> None:
        """Copy blocks (from, to), as they all are before."""

    def active_bytes(self, used_blocks: int) -> int:
        """Bytes of tensors, weights and those blocks included."""


@runtime_checkable
class ByteStage(Protocol):
    """What a stage offers beyond that if it can have a second KV tier.

    A block of KV is `block_bytes` bytes, with `own_memory` in memory that is not the host's.
    """

    block_bytes: int
    own_memory: bool

    def read(self, blocks: Sequence[int]) -> Sequence[Buffer]:
        """The bytes of each block, not shared with the stage."""

    def write(self, blocks: Sequence[int], data: Sequence[Buffer]) -> None:
        """Fill blocks with bytes that `read` has returned earlier."""


Load = Callable[[LoadSpec, Progress], PagedStage]


@dataclass
class Request:
    """`length` positions of it are in its blocks, of which the last `guessed` may be taken back.
    Only the last stage draws."""

    number: int
    sampler: Sampler | None
    length: int
    guessed: int = 0


class _TableBlocks:
    """See `pxd.executors.tier.KvBlocks`."""

    def __init__(
        self, stage: ByteStage, tables: BlockTables, requests: Mapping[int, Request]
    ) -> None:
        self.block_bytes = stage.block_bytes
        self._stage, self._tables, self._requests = stage, tables, requests

    def owners(self, blocks: Sequence[int]) -> list[tuple[Request | None, int]]:
        return [
            (None if number is None else self._requests[number], place)
            for number, place in self._tables.owners(blocks)
        ]

    def read(self, blocks: Sequence[int]) -> list[Buffer | None]:
        full = [block for block in blocks if self._tables.is_full(block)]
        data = dict(zip(full, self._stage.read(full), strict=True))
        return [data.get(block) for block in blocks]

    def write(self, request: Request, place: int, data: Sequence[Buffer]) -> None:
        end = place + len(data)
        self._stage.write(self._tables.table(request.number)[place:end], data)
        self._tables.written(request.number, place * BLOCK_TOKENS, end * BLOCK_TOKENS)


class PagedEngine:
    """See `pxd.executors.protocol.Engine`. Everything must be called in one thread."""

    def __init__(self, load: Load, log: logging.Logger, report: Report = lambda _: None) -> None:
        """`load` raises `ExecutorError`, after which it may be called again. `report` is called
        from another thread for every copy of the second tier."""
        self._load, self._log, self._report = load, log, report
        self._requests: dict[int, Request] = {}
        self._stage: PagedStage | None = None
        self._tables = BlockTables(0)
        self._tier: Tier[Request] | None = None
        self._session = -1
        self._layers = 0, 0
        self._coding: Coding | None = None

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        """Load layers once. Raises `ExecutorError`, after which another load may be tried."""
        if self._stage is not None:
            raise ExecutorError("this process holds a stage already; start another one")
        stage = self._load(spec, progress)
        self._layers = spec.start, spec.end
        self._stage, self._tables = stage, BlockTables(stage.blocks)
        if spec.tier_bytes:
            self._tier = self._open_tier(stage, spec)
        return StageInfo(
            layers=stage.layers,
            hidden_size=stage.hidden_size,
            weight_bytes=stage.weight_bytes,
            kv_tokens=stage.blocks * BLOCK_TOKENS,
            hidden_bytes=stage.hidden_size * stage.dtype.itemsize,
            prefix_cache=True,
            tier_slots=self._tier.slots if self._tier is not None else 0,
            trims=True,
        )

    def step(self, step: Step, body: Buffer) -> StepOutput:
        """Run a step. Raises `StepRejected`; one that is rejected before it runs changes nothing,
        except that its `releases` are freed."""
        self._follow_session(step)
        self.release(step.releases)
        if self._tier is not None:
            self._tier.put_in_place()
        stage = self._stage
        if stage is None:
            raise StepRejected("not-ready", "no layers are loaded")
        self._check(stage, step, body)
        try:
            if self._tier is not None and step.store is not None:
                self._tier.store(step, step.store)
            self._open(stage, step)
            if self._tier is not None and step.load is not None:
                self._tier.load(step, step.load)
            if not step.rows:
                return () if stage.last else (Tensor("i32", (0,)), b"")
            return self._run(stage, step, body)
        except Exception as error:
            # Whatever went wrong, what is in the blocks of all that took part is unknown now.
            lost = self._forget(step)
            self._log.exception("step %d failed", step.step)
            start, end = self._layers
            reason = f"layers [{start}, {end}): {type(error).__name__}: {error}"
            raise StepRejected(code_of(error), reason, lost) from error

    def send_as(self, coding: Coding | None) -> None:
        self._coding = coding

    def release(self, requests: tuple[int, ...]) -> None:
        """Free requests; unknown ones are ignored."""
        for number in requests:
            self._requests.pop(number, None)
        self._tables.release(requests)

    def memory(self) -> MemoryReport:
        return MemoryReport(
            active=0 if self._stage is None else self._stage.active_bytes(self._tables.used),
            resident=psutil.Process().memory_info().rss
            + (self._tier.memory_bytes if self._tier is not None else 0),
            requests=len(self._requests),
            held=sum(blocks_for(request.length) for request in self._requests.values()),
            kept=self._tables.kept,
        )

    def _follow_session(self, step: Step) -> None:
        """What an earlier life of the head knew is of no use to this one."""
        if step.session != self._session:
            self._requests.clear()
            self._tables.clear()
            if self._tier is not None:
                self._tier.forget()
            self._session = step.session

    def _open_tier(self, stage: PagedStage, spec: LoadSpec) -> Tier[Request] | None:
        if not isinstance(stage, ByteStage):
            self._log.warning("no KV tier: this executor has none")
            return None
        blocks = _TableBlocks(stage, self._tables, self._requests)
        return open_tier(spec, blocks, self._requests, self._report, own_memory=stage.own_memory)

    def _check(self, stage: PagedStage, step: Step, body: Buffer) -> None:
        lengths = {number: request.length for number, request in self._requests.items()}
        guessed = {number: request.guessed for number, request in self._requests.items()}
        samplers = {number: request.sampler for number, request in self._requests.items()}
        lengths = check_rows(step, lengths, guessed)
        check_guesses(step, samplers, trims=True)
        too_long = tuple(number for number, length in lengths.items() if length > stage.context)
        if too_long:
            reason = f"requests {too_long} are longer than the model's context of {stage.context}"
            raise StepRejected("bad-step", reason, too_long)
        try:
            self._tables.check(step.openings, step.grants, lengths)
        except TableError as error:
            openings = tuple(opening.request for opening in step.openings)
            raise StepRejected("bad-step", str(error), openings) from error
        check_copies(step, has_tier=self._tier is not None)
        if not step.rows:
            return
        if not stage.last:
            check_output(step, stage.hidden_size * stage.dtype.itemsize)
        if stage.first:
            check_tokens(step, body, stage.vocabulary)
        else:
            check_hidden(step, body, stage.hidden_size)

    def _open(self, stage: PagedStage, step: Step) -> None:
        copies = self._tables.open(step.openings, step.grants)
        if copies:
            stage.copy(copies)
        for opening in step.openings:
            sampler = (
                Sampler(opening.sampling, stage.vocabulary, opening.history) if stage.last else None
            )
            number = opening.request
            self._requests[number] = Request(number, sampler, opening.cached)

    def _forget(self, step: Step) -> tuple[int, ...]:
        opened = tuple(opening.request for opening in step.openings)
        lost = tuple(dict.fromkeys((*requests_of(step.rows), *opened)))
        for number in lost:
            self._requests.pop(number, None)
            self._tables.lose(number)
        return lost

    def _run(self, stage: PagedStage, step: Step, body: Buffer) -> StepOutput:
        tables = [self._tables.table(row.request) for row in step.rows]
        output = stage.forward(step.rows, tables, step.tensor, body)
        for row in step.rows:
            end = row.position + row.count
            self._tables.written(row.request, row.position, end)
            request = self._requests[row.request]
            request.length, request.guessed = end, max(row.draws - 1, 0)
        if not stage.last:
            _check_finite(output, step)
            return to_wire(output, self._coding)
        draws = draws_of(step.rows)
        if not draws:
            return ()
        samplers = [self._requests[number].sampler for number, _ in draws]
        return tuple(draw(output, draws, [s for s in samplers if s is not None]))


def _check_finite(hidden: torch.Tensor, step: Step) -> None:
    """Raises `NotFinite` for the requests whose hidden states are not."""
    finite = torch.isfinite(hidden).all(dim=-1)
    if bool(finite.all()):
        return
    owners = [row.request for row in step.rows for _ in range(row.count)]
    bad = {owner for owner, fine in zip(owners, finite.tolist(), strict=True) if not fine}
    raise NotFinite("the hidden states", tuple(sorted(bad)))
