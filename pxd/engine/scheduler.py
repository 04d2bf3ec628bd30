"""The head's step scheduler: which requests run which positions in the next step.

A plain state machine: no I/O, no clock. Continuous batching with chunked prefill; admission is
first come first served and reserves the worst case, so whatever is admitted can finish.

The last prompt token is always fed as a decode. Prefill chunks then need no logits at all, and one
request alone computes exactly what `mlx_lm.generate_step` computes.
"""

from collections import deque
from collections.abc import Iterable

import msgspec

from pxd.engine.blocks import BlockPool
from pxd.wire import Finish, Opening, Row, SampledToken, Sampling


class NeverFits(Exception):
    """The request needs more KV positions than the pipeline has, even when it is alone."""


class SchedulerConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`max_in_flight` steps may be under way at once: the number of stages keeps all busy."""

    kv_tokens: int
    max_in_flight: int = 1
    max_running: int = 256
    prefill_chunk: int = 2048
    step_tokens: int = 4096


class Generated(msgspec.Struct, frozen=True):
    """One step's result for a request. An end-of-sequence token is not among `tokens`."""

    request: int
    tokens: tuple[int, ...]
    finish: Finish | None


class PlannedStep(msgspec.Struct, frozen=True):
    """`tokens` are the rows' token ids, concatenated in row order."""

    number: int
    rows: tuple[Row, ...]
    tokens: tuple[int, ...]
    openings: tuple[Opening, ...]
    releases: tuple[int, ...]


class _Sequence:
    """`sent` positions are on their way or done; `awaiting` while a sampled token is due."""

    __slots__ = ("awaiting", "eos", "limit", "number", "opened", "sampling", "sent", "tokens")

    def __init__(
        self,
        number: int,
        tokens: list[int],
        max_new: int,
        sampling: Sampling,
        eos: frozenset[int],
    ) -> None:
        self.number = number
        self.tokens = tokens
        self.limit = len(tokens) + max_new
        self.sampling = sampling
        self.eos = eos
        self.sent = 0
        self.opened = False
        self.awaiting = False

    @property
    def prefill_left(self) -> int:
        return len(self.tokens) - 1 - self.sent


class Scheduler:
    """Requests are named by numbers that the caller never reuses.

    Every request that was added ends exactly once: by a `Generated` with a finish, by `cancel`
    returning True, or by being listed by `step_failed`. After `requests` have been given up as a
    whole, the scheduler is thrown away and a new one starts a new session.
    """

    def __init__(self, config: SchedulerConfig) -> None:
        self.config = config
        self._pool = BlockPool(config.kv_tokens)
        self._waiting: deque[_Sequence] = deque()
        self._running: dict[int, _Sequence] = {}
        self._decodable: deque[int] = deque()
        self._releases: list[int] = []
        self._lost_releases: list[int] = []
        self._in_flight: dict[int, PlannedStep] = {}
        self._next_step = 0

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        return len(self._running)

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def requests(self) -> list[int]:
        """Numbers of all requests that have not ended."""
        return [*self._running, *(sequence.number for sequence in self._waiting)]

    @property
    def free_blocks(self) -> int:
        return self._pool.free

    def add(
        self,
        number: int,
        tokens: Iterable[int],
        max_new: int,
        sampling: Sampling,
        eos: frozenset[int],
    ) -> None:
        """Queue a request that has `tokens` so far and may generate `max_new` more.

        Raises `NeverFits` at once for one that no amount of waiting would let in.
        """
        sequence = _Sequence(number, list(tokens), max_new, sampling, eos)
        if not sequence.tokens or max_new < 1:
            raise ValueError("a request needs at least one token and room for one more")
        if not self._pool.fits_ever(sequence.limit):
            capacity = self.config.kv_tokens
            raise NeverFits(
                f"prompt and answer may take {sequence.limit} tokens, "
                f"but this pipeline's KV cache holds {capacity}"
            )
        self._waiting.append(sequence)

    def cancel(self, number: int) -> bool:
        """Forget a request in whatever state it is; False if it has already ended."""
        if number in self._running:
            self._end(self._running[number])
            return True
        for sequence in self._waiting:
            if sequence.number == number:
                self._waiting.remove(sequence)
                return True
        return False

    def next_step(self) -> PlannedStep | None:
        """Return the next step to send, or None while there is nothing to do or enough in flight.

        A step without rows only carries releases; it still goes through all stages, in order.
        """
        if len(self._in_flight) >= self.config.max_in_flight:
            return None
        self._admit()
        rows: list[Row] = []
        tokens: list[int] = []
        openings: list[Opening] = []
        self._take_decodes(rows, tokens, openings)
        self._take_prefills(rows, tokens, openings)
        if not rows and not self._releases:
            return None
        number = self._next_step
        self._next_step += 1
        releases, self._releases = self._releases, []
        if rows:
            # Not with a step of their own: a stage that is in trouble would fail it at once again.
            releases, self._lost_releases = releases + self._lost_releases, []
        step = PlannedStep(
            number, tuple(rows), tuple(tokens), tuple(openings), tuple(dict.fromkeys(releases))
        )
        self._in_flight[number] = step
        return step

    def step_done(self, number: int, sampled: Iterable[SampledToken]) -> list[Generated]:
        """Take a step's tokens. Unknown steps and tokens that are not due are ignored."""
        if self._in_flight.pop(number, None) is None:
            return []
        results = []
        for item in sampled:
            sequence = self._running.get(item.request)
            if sequence is None or not sequence.awaiting or item.position != len(sequence.tokens):
                continue
            sequence.awaiting = False
            results.append(self._append(sequence, item.token))
        return results

    def step_failed(self, number: int, also: Iterable[int] = ()) -> list[int]:
        """A stage did not run step `number`: end its requests, and those named in `also`."""
        lost = list(also)
        step = self._in_flight.pop(number, None)
        if step is not None:
            lost += [row.request for row in step.rows]
            # Stages behind the failed one have not seen them; releasing twice is harmless.
            self._lost_releases += step.releases
        ended = []
        for request in dict.fromkeys(lost):
            sequence = self._running.get(request)
            if sequence is not None:
                self._end(sequence)
                ended.append(request)
        return ended

    def _append(self, sequence: _Sequence, token: int) -> Generated:
        if token in sequence.eos:
            self._end(sequence)
            return Generated(sequence.number, (), "stop")
        sequence.tokens.append(token)
        if len(sequence.tokens) >= sequence.limit:
            self._end(sequence)
            return Generated(sequence.number, (token,), "length")
        self._decodable.append(sequence.number)
        return Generated(sequence.number, (token,), None)

    def _end(self, sequence: _Sequence) -> None:
        """Steps in flight still run for it; the release is behind them on every stage."""
        del self._running[sequence.number]
        self._pool.release(sequence.number)
        if sequence.opened:
            self._releases.append(sequence.number)

    def _admit(self) -> None:
        while self._waiting and len(self._running) < self.config.max_running:
            sequence = self._waiting[0]
            if not self._pool.reserve(sequence.number, sequence.limit):
                return
            self._waiting.popleft()
            self._running[sequence.number] = sequence
            if sequence.prefill_left == 0:
                self._decodable.append(sequence.number)

    def _take_decodes(self, rows: list[Row], tokens: list[int], openings: list[Opening]) -> None:
        # An even share per step in flight keeps every stage busy instead of one big batch moving
        # from stage to stage.
        share = min(-(-len(self._running) // self.config.max_in_flight), self.config.step_tokens)
        while self._decodable and len(rows) < share:
            sequence = self._running.get(self._decodable.popleft())
            if sequence is None:
                continue
            self._take(sequence, 1, True, rows, tokens, openings)
            sequence.awaiting = True

    def _take_prefills(self, rows: list[Row], tokens: list[int], openings: list[Opening]) -> None:
        for sequence in self._running.values():
            left = sequence.prefill_left
            room = self.config.step_tokens - len(tokens)
            if room <= 0:
                return
            if left <= 0:
                continue
            count = min(left, self.config.prefill_chunk, self.config.step_tokens)
            if count > room:
                return
            self._take(sequence, count, False, rows, tokens, openings)
            if sequence.prefill_left == 0:
                self._decodable.append(sequence.number)

    @staticmethod
    def _take(
        sequence: _Sequence,
        count: int,
        sample: bool,
        rows: list[Row],
        tokens: list[int],
        openings: list[Opening],
    ) -> None:
        if not sequence.opened:
            sequence.opened = True
            openings.append(Opening(sequence.number, sequence.sampling))
        rows.append(Row(sequence.number, sequence.sent, count, sample))
        tokens.extend(sequence.tokens[sequence.sent : sequence.sent + count])
        sequence.sent += count
