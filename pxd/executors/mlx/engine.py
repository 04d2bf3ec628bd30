"""The MLX engine: one stage, the caches of its requests, and the running of steps."""

import logging
from pathlib import Path

import mlx.core as mx
import psutil
from mlx_lm.utils import maybe_set_recommended_wired_limit

from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.engine.sampling import Sampler
from pxd.executors.checkpoints import read_checkpoint
from pxd.executors.memory import ADVICE, check_fits, compare, kv_room, stage_bytes
from pxd.executors.mlx.batch import (
    Request,
    can_take_back,
    drop,
    take_back,
)
from pxd.executors.mlx.loader import load_stage
from pxd.executors.mlx.measure import free_memory, wired_limit
from pxd.executors.mlx.passes import Passes, parts_of
from pxd.executors.mlx.prefixes import PrefixStore, can_share_prefixes
from pxd.executors.mlx.split import cache_token_bytes
from pxd.executors.mlx.stage import Caches, Stage
from pxd.executors.mlx.tensors import from_wire, mlx_dtype, to_wire
from pxd.executors.mlx.tier import open_tier
from pxd.executors.mlx.trial import dummy_inputs, supports_batches, supports_guesses
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
    check_capacity,
    check_copies,
    check_guesses,
    check_hidden,
    check_output,
    check_rows,
    check_tokens,
    requests_of,
)
from pxd.executors.slots import Report
from pxd.executors.tier import Tier
from pxd.executors.trouble import code_of
from pxd.wire import Buffer, Coding, Row, Step, Tensor

log = logging.getLogger("pxd.executors.mlx")

CLEAR_CACHE_STEPS = 256


class MlxEngine:
    """See `pxd.executors.protocol.Engine`. Everything must be called in one thread."""

    def __init__(self, report: Report = lambda _: None) -> None:
        """`report` is called from another thread for every copy of the second tier."""
        self._report = report
        self._requests: dict[int, Request] = {}
        self._prefixes: PrefixStore | None = None
        self._tier: Tier[Request] | None = None
        self._session = -1
        self._passes: Passes | None = None
        self._trims = False
        self._kv_tokens: int | None = None
        self._layers = 0, 0
        self._hidden_bytes = 0
        self._coding: Coding | None = None
        self._steps = 0

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        """Load layers once. Raises `ExecutorError`, after which another load may be tried."""
        if self._passes is not None:
            raise ExecutorError("this process holds a stage already; start another one")
        checkpoint = read_checkpoint(spec)
        computed = stage_bytes(checkpoint, spec.start, spec.end)
        check_fits(computed, free_memory(), _advice())
        maybe_set_recommended_wired_limit()
        try:
            loaded = load_stage(Path(spec.path), checkpoint, spec.start, spec.end, progress)
        except (RuntimeError, ValueError, KeyError, TypeError, OSError) as error:
            raise ExecutorError(
                f"cannot load layers [{spec.start}, {spec.end}) of {spec.path}: "
                f"{type(error).__name__}: {error}{_hint(error)}"
            ) from error
        compare(computed, loaded.weight_bytes)
        batching = supports_batches(loaded.stage, loaded.dtype)
        mx.clear_cache()
        caches = _used_caches(loaded.stage, loaded.dtype)
        # Counting windows in full promises less than there is, but holds for any mix of requests.
        token_bytes = sum(cache_token_bytes(cache) for cache in caches)
        kv_bytes = kv_room(spec.kv_bytes, free_memory(), token_bytes * BLOCK_TOKENS, _advice())
        self._layers = spec.start, spec.end
        width = loaded.stage.width(loaded.dtype, incoming=False)
        self._hidden_bytes = width * loaded.dtype.size
        self._passes = Passes(loaded.stage, batching=batching)
        if can_share_prefixes(loaded.stage.make_caches()):
            self._prefixes = PrefixStore(self._requests)
        self._trims = can_take_back(caches) and supports_guesses(loaded.stage, loaded.dtype)
        mx.clear_cache()
        if spec.tier_bytes and self._prefixes is None:
            log.warning("no KV tier: caches of several kinds, or with a state, cannot be cut up")
        elif spec.tier_bytes and self._prefixes is not None:
            self._tier = open_tier(spec, caches, self._prefixes, self._requests, self._report)
        kv_tokens = kv_bytes // token_bytes if token_bytes else 1 << 40
        self._kv_tokens = kv_tokens if spec.kv_bytes else None
        return StageInfo(
            layers=loaded.stage.layers,
            hidden_size=loaded.stage.hidden_size,
            weight_bytes=loaded.weight_bytes,
            kv_tokens=kv_tokens,
            hidden_bytes=self._hidden_bytes,
            prefix_cache=self._prefixes is not None,
            tier_slots=self._tier.slots if self._tier else 0,
            trims=self._trims,
        )

    def step(self, step: Step, body: Buffer) -> StepOutput:
        """Run a step. Raises `StepRejected`; one that is rejected before it runs changes nothing,
        except that its `releases` are freed."""
        self._follow_session(step)
        self.release(step.releases)
        if self._tier is not None:
            self._tier.put_in_place()
        passes = self._passes
        if passes is None:
            raise StepRejected("not-ready", "no layers are loaded")
        stage = passes.stage
        self._check(stage, step, body)
        if self._tier is not None and step.store is not None:
            self._tier.store(step, step.store)
        self._open(stage, step)
        if self._tier is not None and step.load is not None:
            self._tier.load(step, step.load)
        if not step.rows:
            return () if stage.last else (Tensor("i32", (0,)), b"")
        try:
            return self._run(passes, step, body)
        except Exception as error:
            # Whatever went wrong, the caches of all that took part are of unknown length now.
            lost = self._forget(step.rows)
            mx.clear_cache()
            log.exception("step %d failed", step.step)
            start, end = self._layers
            reason = f"layers [{start}, {end}): {type(error).__name__}: {error}"
            raise StepRejected(code_of(error), reason, lost) from error

    def send_as(self, coding: Coding | None) -> None:
        self._coding = coding

    def release(self, requests: tuple[int, ...]) -> None:
        """Free requests; unknown ones are ignored."""
        known = [self._requests[number] for number in requests if number in self._requests]
        if self._prefixes is not None:
            for request in known:
                self._prefixes.release(request)
        for request in known:
            del self._requests[request.number]
        if known:
            drop(known)

    def _follow_session(self, step: Step) -> None:
        """What an earlier life of the head knew is of no use to this one."""
        if step.session != self._session:
            self.release(tuple(self._requests))
            if self._prefixes is not None:
                self._prefixes.clear()
            if self._tier is not None:
                self._tier.forget()
            self._session = step.session

    def _open(self, stage: Stage, step: Step) -> None:
        for opening in step.openings:
            caches, length = stage.make_caches(), 0
            if self._prefixes is not None:
                caches, length = self._prefixes.open(opening, caches), opening.cached
            sampler = (
                Sampler(opening.sampling, stage.vocabulary, opening.history) if stage.last else None
            )
            request = Request(opening.request, sampler, caches)
            request.length = length
            self._requests[opening.request] = request
        if self._prefixes is not None:
            self._prefixes.grant(step)

    def memory(self) -> MemoryReport:
        return MemoryReport(
            active=mx.get_active_memory(),
            resident=psutil.Process().memory_info().rss
            + (self._tier.memory_bytes if self._tier is not None else 0),
            requests=len(self._requests),
            held=sum(blocks_for(request.length) for request in self._requests.values()),
            kept=self._prefixes.blocks_kept if self._prefixes is not None else 0,
        )

    def _check(self, stage: Stage, step: Step, body: Buffer) -> None:
        lengths = {number: request.length for number, request in self._requests.items()}
        guessed = {number: request.guessed for number, request in self._requests.items()}
        samplers = {number: request.sampler for number, request in self._requests.items()}
        lengths = check_rows(step, lengths, guessed)
        check_guesses(step, samplers, trims=self._trims)
        if self._prefixes is not None:
            self._prefixes.check(step)
        elif any(opening.cached for opening in step.openings):
            raise StepRejected("bad-step", "this model's caches cannot be shared")
        check_copies(step, has_tier=self._tier is not None)
        if not step.rows:
            return
        if self._kv_tokens is not None:
            check_capacity(step, lengths, self._kv_tokens)
        if stage.first:
            check_tokens(step, body, stage.vocabulary)
        else:
            dtype = step.tensor.dtype
            width = 0 if dtype == "i32" else stage.width(mlx_dtype(dtype), incoming=True)
            check_hidden(step, body, width)
        if not stage.last:
            check_output(step, self._hidden_bytes)

    def _forget(self, rows: tuple[Row, ...]) -> tuple[int, ...]:
        """Drop the requests of `rows` and all that share a batch with them."""
        lost = dict.fromkeys(requests_of(rows))
        for number in list(lost):
            batch = self._requests[number].batch
            if batch is not None:
                lost.update(dict.fromkeys(member.number for member in batch.members))
        for number in lost:
            request = self._requests.pop(number)
            request.batch = request.caches = None
            if self._prefixes is not None:
                self._prefixes.lose(number)
        return tuple(lost)

    def _run(self, passes: Passes, step: Step, body: Buffer) -> StepOutput:
        inputs = from_wire(step.tensor, body)
        for row in step.rows:
            # What lies behind a request's own earlier row is not there yet.
            take_back(self._requests[row.request], row.position)
            self._requests[row.request].guessed = max(row.draws - 1, 0)
        parts = parts_of(step.rows, self._requests)
        done = passes.run(inputs, parts)
        self._steps += 1
        if parts.fills or self._steps % CLEAR_CACHE_STEPS == 0:
            mx.clear_cache()
        if passes.stage.last:
            drawn = sorted(drawn for each in done for drawn in each.tokens())
            return tuple(token for _, tokens in drawn for token in tokens)
        found = [pair for each in done for pair in zip(each.parts, each.hidden, strict=True)]
        found.sort(key=lambda pair: pair[0].begin)
        hidden = [output for _, output in found]
        whole = hidden[0] if len(hidden) == 1 else mx.concatenate(hidden)
        carries = whole.shape[-1] > passes.stage.hidden_size
        # One scale would have to do for all columns, and not all are of one size.
        return to_wire(whole, None if carries else self._coding)


def _advice() -> str:
    limit = wired_limit()
    if not limit:
        return ADVICE
    return (
        f"macOS lets the GPU use {limit / (1 << 30):.1f} GiB, which "
        f"`sudo sysctl iogpu.wired_limit_mb=…` raises; else {ADVICE}"
    )


def _hint(error: Exception) -> str:
    if "GatherMM" in str(error):
        return (
            " (MLX runs mixtures of experts on a CPU only in float32 or quantised; "
            "quantise the model, for example with mlx_lm.convert -q)"
        )
    return ""


def _used_caches(stage: Stage, dtype: mx.Dtype) -> Caches:
    """Caches with a few positions, of which only shapes and types are known."""
    caches = stage.make_caches()
    stage.forward(dummy_inputs(stage, 1, 2, dtype), caches)
    return caches
