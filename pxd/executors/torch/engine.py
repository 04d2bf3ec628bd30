"""The PyTorch engine: one stage, its blocks of KV, and the running of steps."""

import logging
from dataclasses import dataclass
from pathlib import Path

import psutil
import torch

from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.engine.sampling import Sampler
from pxd.engine.tables import BlockTables, TableError
from pxd.executors.checkpoints import read_checkpoint
from pxd.executors.memory import ADVICE, check_fits, compare, kv_room, stage_bytes
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
from pxd.executors.torch.decode import draw
from pxd.executors.torch.device import choose_device, free_memory
from pxd.executors.torch.kv import KvPool, Rows, token_numbers
from pxd.executors.torch.loader import load_stage
from pxd.executors.torch.stage import Stage
from pxd.executors.torch.tensors import from_wire, to_wire
from pxd.executors.trouble import NotFinite, code_of
from pxd.wire import Buffer, Coding, Step, Tensor

log = logging.getLogger("pxd.executors.torch")

DEFAULT_KV_TOKENS = 16_384
"""Where nobody says how much memory there is for them."""


@dataclass
class Request:
    """`length` positions of it are in its blocks, of which the last `guessed` may be taken back.
    Only the last stage draws."""

    sampler: Sampler | None
    length: int
    guessed: int = 0


@dataclass(frozen=True)
class _Loaded:
    stage: Stage
    pool: KvPool
    tables: BlockTables


class TorchEngine:
    """See `pxd.executors.protocol.Engine`. Everything must be called in one thread."""

    def __init__(self, _report: Report = lambda _: None) -> None:
        self._requests: dict[int, Request] = {}
        self._loaded: _Loaded | None = None
        self._session = -1
        self._layers = 0, 0
        self._coding: Coding | None = None

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        """Load layers once. Raises `ExecutorError`, after which another load may be tried."""
        if self._loaded is not None:
            raise ExecutorError("this process holds a stage already; start another one")
        checkpoint = read_checkpoint(spec)
        device = choose_device()
        computed = stage_bytes(checkpoint, spec.start, spec.end)
        check_fits(computed, free_memory(device), ADVICE)
        try:
            stage = load_stage(Path(spec.path), checkpoint, spec.start, spec.end, device, progress)
            compare(computed, stage.weight_bytes)
            position = token_numbers(stage.shapes) * stage.dtype.itemsize
            planned = spec.kv_bytes or DEFAULT_KV_TOKENS * position
            room = kv_room(planned, free_memory(device), position * BLOCK_TOKENS, ADVICE)
            blocks = room // (position * BLOCK_TOKENS)
            pool = KvPool(stage.shapes, blocks, stage.dtype, stage.device)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError, ImportError) as error:
            raise ExecutorError(
                f"cannot load layers [{spec.start}, {spec.end}) of {spec.path}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if spec.tier_bytes:
            log.warning("no KV tier: the torch executor has none yet")
        self._layers = spec.start, spec.end
        self._loaded = _Loaded(stage, pool, BlockTables(blocks))
        return StageInfo(
            layers=stage.layers,
            hidden_size=stage.hidden_size,
            weight_bytes=stage.weight_bytes,
            kv_tokens=blocks * BLOCK_TOKENS,
            hidden_bytes=stage.hidden_bytes,
            prefix_cache=True,
            trims=True,
        )

    def step(self, step: Step, body: Buffer) -> StepOutput:
        """Run a step. Raises `StepRejected`; one that is rejected before it runs changes nothing,
        except that its `releases` are freed."""
        self._follow_session(step)
        self.release(step.releases)
        loaded = self._loaded
        if loaded is None:
            raise StepRejected("not-ready", "no layers are loaded")
        self._check(loaded, step, body)
        try:
            self._open(loaded, step)
            if not step.rows:
                return () if loaded.stage.last else (Tensor("i32", (0,)), b"")
            return self._run(loaded, step, body)
        except Exception as error:
            # Whatever went wrong, what is in the blocks of all that took part is unknown now.
            lost = self._forget(loaded, step)
            log.exception("step %d failed", step.step)
            start, end = self._layers
            reason = f"layers [{start}, {end}): {type(error).__name__}: {error}"
            raise StepRejected(code_of(error), reason, lost) from error

    def send_as(self, coding: Coding | None) -> None:
        self._coding = coding

    def release(self, requests: tuple[int, ...]) -> None:
        """Free requests; unknown ones are ignored."""
        for number in requests:
            self._requests.pop(number, None)
        if self._loaded is not None:
            self._loaded.tables.release(requests)

    def memory(self) -> MemoryReport:
        """Of a GPU, what PyTorch has taken; of a CPU, weights and the blocks that are in tables."""
        return MemoryReport(
            active=self._active(),
            resident=psutil.Process().memory_info().rss,
            requests=len(self._requests),
            held=sum(blocks_for(request.length) for request in self._requests.values()),
            kept=self._loaded.tables.kept if self._loaded is not None else 0,
        )

    def _active(self) -> int:
        loaded = self._loaded
        if loaded is None:
            return 0
        if loaded.stage.device.type == "cuda":
            return int(torch.cuda.memory_allocated(loaded.stage.device))
        return loaded.stage.weight_bytes + loaded.tables.used * loaded.pool.block_bytes

    def _follow_session(self, step: Step) -> None:
        """What an earlier life of the head knew is of no use to this one."""
        if step.session != self._session:
            self._requests.clear()
            if self._loaded is not None:
                self._loaded.tables.clear()
            self._session = step.session

    def _check(self, loaded: _Loaded, step: Step, body: Buffer) -> None:
        lengths = {number: request.length for number, request in self._requests.items()}
        guessed = {number: request.guessed for number, request in self._requests.items()}
        samplers = {number: request.sampler for number, request in self._requests.items()}
        lengths = check_rows(step, lengths, guessed)
        check_guesses(step, samplers, trims=True)
        try:
            loaded.tables.check(step.openings, step.grants, lengths)
        except TableError as error:
            openings = tuple(opening.request for opening in step.openings)
            raise StepRejected("bad-step", str(error), openings) from error
        check_copies(step, has_tier=False)
        if not step.rows:
            return
        if loaded.stage.first:
            check_tokens(step, body, loaded.stage.vocabulary)
        else:
            check_hidden(step, body, loaded.stage.hidden_size)
        if not loaded.stage.last:
            check_output(step, loaded.stage.hidden_bytes)

    def _open(self, loaded: _Loaded, step: Step) -> None:
        loaded.pool.copy(loaded.tables.open(step.openings, step.grants))
        for opening in step.openings:
            sampler = (
                Sampler(opening.sampling, loaded.stage.vocabulary, opening.history)
                if loaded.stage.last
                else None
            )
            self._requests[opening.request] = Request(sampler, opening.cached)

    def _forget(self, loaded: _Loaded, step: Step) -> tuple[int, ...]:
        opened = tuple(opening.request for opening in step.openings)
        lost = tuple(dict.fromkeys((*requests_of(step.rows), *opened)))
        for number in lost:
            self._requests.pop(number, None)
            loaded.tables.lose(number)
        return lost

    def _run(self, loaded: _Loaded, step: Step, body: Buffer) -> StepOutput:
        stage, tables = loaded.stage, loaded.tables
        inputs = from_wire(step.tensor, body, stage.device)
        rows = Rows(
            loaded.pool, [(row.position, row.count, tables.table(row.request)) for row in step.rows]
        )
        places = _drawn_places(step)
        wanted = torch.tensor(places, dtype=torch.long, device=stage.device)
        output = stage.forward(inputs, rows.positions, rows, wanted)
        for row in step.rows:
            end = row.position + row.count
            tables.written(row.request, row.position, end)
            request = self._requests[row.request]
            request.length, request.guessed = end, max(row.draws - 1, 0)
        if not stage.last:
            _check_finite(output, step)
            return to_wire(output, self._coding)
        if not places:
            return ()
        draws = draws_of(step.rows)
        samplers = [self._requests[number].sampler for number, _ in draws]
        return tuple(draw(output, draws, [s for s in samplers if s is not None]))


def _drawn_places(step: Step) -> list[int]:
    """The places in the step's tensor from whose positions something is drawn."""
    places: list[int] = []
    begin = 0
    for row in step.rows:
        begin += row.count
        places += range(begin - row.draws, begin)
    return places


def _check_finite(hidden: torch.Tensor, step: Step) -> None:
    """Raises `NotFinite` for the requests whose hidden states are not."""
    finite = torch.isfinite(hidden).all(dim=-1)
    if bool(finite.all()):
        return
    owners = [row.request for row in step.rows for _ in range(row.count)]
    bad = {owner for owner, fine in zip(owners, finite.tolist(), strict=True) if not fine}
    raise NotFinite("the hidden states", tuple(sorted(bad)))
