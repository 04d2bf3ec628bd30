"""The head's step scheduler: which requests run which positions in the next step.

A plain state machine: no I/O, no clock. It owns the requests from the queue to their end; a
`Policy` decides who is let in, how KV is counted, and what a step holds.
"""

from collections.abc import Iterable, Mapping
from collections.abc import Sequence as Items
from typing import Protocol

import msgspec

from pxd.engine.deadlines import Deadlines
from pxd.engine.hashing import BlockHashes
from pxd.engine.queue import QueueFull, WaitingQueue
from pxd.engine.requests import Generated, NewRequest, Sequence
from pxd.wire import Copy, Finish, Grant, Opening, Row, SampledToken

__all__ = [
    "Batch",
    "Generated",
    "NeverFits",
    "NewRequest",
    "PlannedStep",
    "Policy",
    "QueueFull",
    "Scheduler",
]


MAX_OPENING_COST = 1 << 17
"""Bytes in a step's openings beyond which no further one is added. The largest `History` on top
still leaves room in a header."""


class NeverFits(Exception):
    """The request needs more than the pipeline has, even when it is alone."""


class PlannedStep(msgspec.Struct, frozen=True):
    """`tokens` are the rows' token ids, concatenated in row order."""

    number: int
    rows: tuple[Row, ...]
    tokens: tuple[int, ...]
    openings: tuple[Opening, ...]
    releases: tuple[int, ...]
    grants: tuple[Grant, ...] = ()
    store: Copy | None = None
    load: Copy | None = None


class Batch:
    """A step in the making."""

    def __init__(self) -> None:
        self.rows: list[Row] = []
        self.tokens: list[int] = []
        self.openings: list[Opening] = []
        self.grants: list[Grant] = []
        self.store: Copy | None = None
        self.load: Copy | None = None
        self._opening_cost = 0

    def accepts(self, sequence: Sequence) -> bool:
        """Whether there is room in the step's header, if the sequence must be opened first."""
        return sequence.opened or self._opening_cost < MAX_OPENING_COST

    @property
    def is_empty(self) -> bool:
        return not self.rows and self.store is None and self.load is None

    def open(self, sequence: Sequence) -> None:
        """Make a sequence and all of its blocks known to the stages."""
        if not sequence.opened:
            sequence.opened = True
            opening = Opening(
                sequence.number,
                sequence.sampling,
                sequence.sent,
                sequence.hits,
                sequence.history(),
            )
            self.openings.append(opening)
            self._opening_cost += _opening_cost(opening)
        if sequence.granted < len(sequence.blocks):
            blocks = tuple(sequence.blocks[sequence.granted :])
            self.grants.append(Grant(sequence.number, blocks))
            sequence.granted = len(sequence.blocks)

    def take(
        self, sequence: Sequence, count: int, *, sample: bool, guesses: Items[int] = ()
    ) -> None:
        """Run the next `count` positions of a sequence; with `sample` draw what follows them.

        `guesses` at what will be drawn run along, and so what follows each of them is drawn, too.
        """
        self.open(sequence)
        draws = 1 + len(guesses) if sample else 0
        self.rows.append(Row(sequence.number, sequence.sent, count + len(guesses), draws))
        self.tokens += sequence.tokens[sequence.sent : sequence.sent + count]
        self.tokens += guesses
        sequence.sent += count + len(guesses)
        sequence.guesses = list(guesses)
        sequence.awaiting = sample


def _opening_cost(opening: Opening) -> int:
    """Bytes that it may take, beside what every opening takes. Distances are mostly of one byte."""
    sampling, history = opening.sampling, opening.history
    numbers = 5 * (len(opening.hits) + len(sampling.barred)) + 15 * len(sampling.logit_bias)
    return numbers + (len(history.prompt) + len(history.answer) if history else 0)


class Policy(Protocol):
    """How KV is counted and steps are made. `Scheduler` calls; nothing calls back."""

    max_in_flight: int

    def hashes(self) -> BlockHashes: ...

    def refusal(self, sequence: Sequence) -> str:
        """Why a sequence could not even run alone; empty if it can."""

    def hopeless(self, sequence: Sequence) -> str:
        """Why a sequence that does not get in, though nobody runs, never will; empty if it may."""

    def begin(self) -> None:
        """A step is about to be made."""

    def admit(self, sequence: Sequence, running: Mapping[int, Sequence]) -> bool:
        """Let in whom the queue has first, taking what it needs; False to let it wait."""

    def compose(self, running: dict[int, Sequence], batch: Batch) -> list[Sequence]:
        """Fill `batch`. Returns those that had to make room: they have lost all they had.

        `running` is in the order in which members should be served; it may be rearranged.
        """

    def progressed(self, sequence: Sequence) -> None:
        """`sequence.done` has grown."""

    def ended(self, sequence: Sequence, *, intact: bool) -> None:
        """A running sequence has ended; `intact` unless a stage has lost what it held."""

    def copied(self, event: int, stage: int, failed: Iterable[int]) -> list[Sequence]:
        """A stage is done with a copy of the second tier, except for the slots `failed`.

        Returns those for whom a load has failed: they have lost all they had.
        """

    def starved(self, positions: int, running: int) -> bool:
        """A stage had no memory for a step of so many positions, while so many requests ran: make
        smaller ones. False if there are none."""

    def eased(self) -> None:
        """A step is done, and all are done who had to begin again for want of memory."""

    def oldest_copy(self) -> int | None:
        """The number of the copy that has been under way for longest; numbers only grow."""

    def lost(self, step: PlannedStep) -> list[int]:
        """A stage may not have seen this step. Returns the requests that waited for its load."""


class Scheduler:
    """Every request that was added ends exactly once: by a `Generated` with a finish, by `cancel`
    returning True, or by being listed by `expire`, `step_failed` or `take_refused`. When all are
    given up as a whole, the scheduler is thrown away and a new one starts a new session.
    """

    def __init__(self, policy: Policy, *, max_waiting: int = 16384) -> None:
        self.policy = policy
        self._queue = WaitingQueue(max_waiting)
        self._running: dict[int, Sequence] = {}
        self._releases: list[int] = []
        self._lost_releases: list[int] = []
        self._in_flight: dict[int, PlannedStep] = {}
        # Those who began again for want of memory; steps in flight that they are part of, which
        # must fail; and whether to wait until nothing is in flight.
        self._starved: set[int] = set()
        self._doomed: set[int] = set()
        self._settling = False
        self._next_step = 0
        self._greets = False
        self._admitted = 0
        self._refused: list[tuple[int, str]] = []
        self._deadlines = Deadlines(
            lambda number: number in self._running or number in self._queue,
            lambda: len(self._running) + len(self._queue),
        )

    @property
    def waiting(self) -> int:
        return len(self._queue)

    @property
    def running(self) -> int:
        """Requests that were let in, those who wait for the second tier included."""
        return len(self._running)

    @property
    def loading(self) -> int:
        """How many of `running` wait for blocks from the second tier."""
        return sum(sequence.loading for sequence in self._running.values())

    @property
    def in_flight(self) -> int:
        return len(self._in_flight)

    @property
    def requests(self) -> list[int]:
        """Numbers of all requests that have not ended."""
        return [*self._running, *self.queued]

    @property
    def queued(self) -> list[int]:
        """Numbers of those that wait, in order of arrival."""
        return [sequence.number for sequence in self._queue]

    @property
    def admitted(self) -> list[int]:
        """Numbers of those that run, in order of admission."""
        return [s.number for s in sorted(self._running.values(), key=lambda s: s.admitted)]

    def greet(self) -> None:
        """Have a step sent even if there is nothing to do: stages then forget all that was before
        this scheduler."""
        self._greets = True

    def add(self, request: NewRequest) -> None:
        """Queue a request. Raises `NeverFits` at once for one that no amount of waiting would let
        in, and `QueueFull`."""
        if not request.tokens or request.max_new < 1:
            raise ValueError("a request needs at least one token and room for one more")
        sequence = Sequence(request, self.policy.hashes())
        refusal = self.policy.refusal(sequence)
        if refusal:
            raise NeverFits(refusal)
        self._queue.push(sequence)
        self._deadlines.add(sequence.number, sequence.deadline)

    def cancel(self, number: int) -> bool:
        """Forget a request in whatever state it is; False if it has already ended."""
        if number in self._running:
            self._end(self._running[number])
            return True
        return self._queue.remove(number) is not None

    def expire(self, now: float) -> list[int]:
        """End those whose deadline is over; returns their numbers."""
        late = self._deadlines.take_due(now)
        for number in late:
            self.cancel(number)
        return late

    @property
    def next_deadline(self) -> float:
        """When `expire` will have something to do, as things are; infinity if never."""
        return self._deadlines.first()

    def next_step(self) -> PlannedStep | None:
        """Return the next step to send, or None while there is nothing to do or enough in flight.

        A step without rows only carries releases and copies; it still goes through all stages, in
        order.
        """
        if len(self._in_flight) >= self.policy.max_in_flight:
            return None
        if self._settling and self._in_flight:
            return None
        self._settling = False
        self.policy.begin()
        self._admit()
        batch = Batch()
        for sequence in self.policy.compose(self._running, batch):
            self._preempt(sequence)
        if batch.is_empty and not self._releases and not self._greets:
            return None
        self._greets = False
        step = self._step(batch)
        self._in_flight[step.number] = step
        return step

    def step_done(self, number: int, sampled: Iterable[SampledToken]) -> list[Generated]:
        """Take a step's tokens. Unknown steps and tokens that are not due are ignored."""
        step = self._in_flight.pop(number, None)
        if step is None:
            return []
        drawn: dict[int, list[SampledToken]] = {}
        for item in sampled:
            drawn.setdefault(item.request, []).append(item)
        results = []
        for row in step.rows:
            sequence = self._running.get(row.request)
            if sequence is None or row.position != sequence.done:
                continue
            result = None
            if row.draws:
                result = self._accept(sequence, row, drawn.get(row.request, []))
            else:
                sequence.done += row.count
            self.policy.progressed(sequence)
            if result is not None:
                results.append(result)
                if result.finish is not None:
                    self._end(sequence)
        self._doomed.discard(number)
        self._starved = {n for n in self._starved if n in self._running or n in self._queue}
        if not self._starved:
            self.policy.eased()
        return results

    def step_failed(
        self, number: int, also: Iterable[int] = (), *, starved: bool = False
    ) -> list[int]:
        """A stage did not run step `number`: end its requests, and those named in `also`.

        Where the stage was `starved` of memory, they go back to the queue and begin again in
        smaller steps, as long as there are smaller ones. Returns those that have ended.
        """
        lost = list(also)
        step = self._in_flight.pop(number, None)
        if step is not None:
            lost += [row.request for row in step.rows]
            lost += self.policy.lost(step)
            # Stages behind the failed one have not seen them; releasing twice is harmless.
            self._lost_releases += step.releases
        there = [self._running[n] for n in dict.fromkeys(lost) if n in self._running]
        positions = sum(row.count for row in step.rows) if step is not None else 0
        if number in self._doomed or (
            starved and positions and self.policy.starved(positions, len(self._running))
        ):
            self._begin_again(number, there)
            return []
        for sequence in there:
            self._end(sequence, intact=False)
        return [sequence.number for sequence in there]

    def copied(self, event: int, stage: int, failed: Iterable[int] = ()) -> None:
        """A stage is done with a copy, except for the slots `failed`; unknown ones are ignored.

        Whoever waited for what could not be loaded goes back to the queue and is computed anew.
        """
        for sequence in self.policy.copied(event, stage, failed):
            self._preempt(sequence)

    def take_refused(self) -> list[tuple[int, str]]:
        """Who had to be refused after waiting, and why."""
        refused, self._refused = self._refused, []
        return refused

    def _admit(self) -> None:
        while (sequence := self._queue.first()) is not None:
            if not self.policy.admit(sequence, self._running):
                reason = "" if self._running else self.policy.hopeless(sequence)
                if not reason:
                    return
                self._queue.remove(sequence.number)
                self._refused.append((sequence.number, reason))
                continue
            self._queue.take(sequence)
            self._admitted += 1
            sequence.admitted = self._admitted
            self._running[sequence.number] = sequence

    def _step(self, batch: Batch) -> PlannedStep:
        releases, self._releases = self._releases, []
        if not batch.is_empty:
            # Not with a step of their own: a stage that is in trouble would fail it at once again.
            releases, self._lost_releases = releases + self._lost_releases, []
        number = self._next_step
        self._next_step += 1
        return PlannedStep(
            number,
            tuple(batch.rows),
            tuple(batch.tokens),
            tuple(batch.openings),
            tuple(dict.fromkeys(releases)),
            tuple(batch.grants),
            batch.store,
            batch.load,
        )

    @staticmethod
    def _accept(sequence: Sequence, row: Row, drawn: Iterable[SampledToken]) -> Generated | None:
        """Take what was drawn up to the first token that was guessed otherwise, that one included.

        A token is drawn by its position and the logits there alone, and these are right as long as
        all guesses before were: so these are exactly the tokens of as many steps without guesses.
        """
        guesses, sequence.guesses = sequence.guesses, []
        taken: list[SampledToken] = []
        finish: Finish | None = None
        right, due = 0, len(sequence.tokens)
        for item in drawn:
            if item.position != due + right:
                continue
            sequence.awaiting = False
            if item.token in sequence.eos:
                finish = "stop"
                break
            taken.append(item)
            sequence.tokens.append(item.token)
            if len(sequence.tokens) >= sequence.limit:
                finish = "length"
                break
            if right == len(guesses) or guesses[right] != item.token:
                break
            right += 1
        else:
            # Draws are missing, so the last token must be fed again.
            right = max(right - 1, 0)
        # Positions of wrong guesses are sent again, with other tokens.
        sequence.sent = sequence.done = row.position + row.count - len(guesses) + right
        if sequence.guesser is not None:
            sequence.guesser.learn(len(guesses), right)
        if sequence.awaiting:
            return None
        tokens = tuple(item.token for item in taken)
        logprobs = tuple(item.logprobs for item in taken if item.logprobs is not None)
        return Generated(sequence.number, tokens, finish, logprobs)

    def _preempt(self, sequence: Sequence) -> None:
        """Its blocks are gone already; what it has generated is part of its prompt from now on."""
        del self._running[sequence.number]
        if sequence.opened:
            self._releases.append(sequence.number)
        sequence.preemptions += 1
        sequence.reset()
        self._queue.put_back(sequence)

    def _begin_again(self, failed: int, sequences: Items[Sequence]) -> None:
        """Nothing new is sent until all steps behind the one that `failed` have come back: a
        stage knows these requests no more, and it must not meet them anew before that."""
        self._doomed.discard(failed)
        self._settling = True
        numbers = {sequence.number for sequence in sequences}
        for sequence in sequences:
            self.policy.ended(sequence, intact=False)
            self._preempt(sequence)
        self._starved |= numbers
        for step in self._in_flight.values():
            if step.number > failed and any(row.request in numbers for row in step.rows):
                self._doomed.add(step.number)

    def _end(self, sequence: Sequence, *, intact: bool = True) -> None:
        """Steps in flight still run for it; the release is behind them on every stage."""
        del self._running[sequence.number]
        self.policy.ended(sequence, intact=intact)
        if sequence.opened:
            self._releases.append(sequence.number)
