"""The policy that pxd serves with: continuous batching, chunked prefill, KV in blocks.

Every step takes an even share of the running requests' decodes and fills up with prefill chunks
(Sarathi-Serve, Agrawal et al. 2024), so that as many steps as the pipeline has stages are in flight
and none of them is starved. The last prompt token is always fed as a decode: prefill chunks then
need no logits at all, and one request alone computes exactly what `mlx_lm.generate_step` computes.
"""

from collections.abc import Callable, Iterable, Mapping
from typing import Literal

import msgspec

from pxd.engine.blocks import BLOCK_TOKENS, BlockPool, blocks_for
from pxd.engine.hashing import BlockHash, BlockHashes
from pxd.engine.history import has_penalties
from pxd.engine.pressure import Pressure
from pxd.engine.requests import Sequence
from pxd.engine.scheduler import Batch, PlannedStep
from pxd.engine.speculation import Guesser, PromptLookup
from pxd.engine.tier import Part, StoreWhen, Tier
from pxd.wire import Copy

MAX_LOADING_BLOCKS = 256
"""What a stage may have to hold in memory twice."""

Admission = Literal["reserve", "preempt"]
Storage = Literal["shared", "own"]


class ContinuousConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`kv_tokens` is what the smallest stage holds.

    With admission "reserve" a request is let in when its longest possible answer fits, so nobody
    who is in ever has to leave. With "preempt" the prompt must fit; when blocks run out, the latest
    comer gives its own back, and computes them again later.

    "preempt" is the default by measurement (`scripts/admission`, chats with 4096 tokens allowed and
    250 taken, at nine tenths of what the pipeline can do): 1.2 times the tokens per second and a
    median time to the first token of 1.2 s against 42 s with room for 8 such answers, 4.6 times the
    tokens with room for 2, the same where memory is plenty. "reserve" is better only where many
    answers take all they are allowed: 1.1 times the tokens, at twice the load.

    With storage "shared" requests hold the same block of a common prefix. With "own" each has a
    copy, for executors that keep a request's KV in one piece; a block that nobody holds any more
    is handed on without copying. `root` names model and revision; `prefix_cache` says whether
    stages can begin a request with what another one has left.

    `tier_slots` is how many blocks each of `stages` stages can keep in its second tier; it needs
    the prefix cache.
    """

    kv_tokens: int
    max_in_flight: int = 1
    max_running: int = 256
    prefill_chunk: int = 2048
    step_tokens: int = 4096
    admission: Admission = "preempt"
    storage: Storage = "own"
    prefix_cache: bool = True
    root: bytes = b""
    stages: int = 1
    tier_slots: int = 0
    tier_store: StoreWhen = "lazy"


class Continuous:
    """See `pxd.engine.scheduler.Policy`. `mixed_tokens`, the budget of positions in a step while
    somebody waits for its next token, `max_in_flight`, and `guesses`, how many tokens a request may
    run that are only guessed, may be changed at any time.

    Who guesses has a step to itself, as all have while there are no more of them than steps in
    flight: so nobody waits for it whom it would have taken along. It needs stages that can take
    positions back. Penalties depend on the tokens before, so with them nothing is guessed.
    """

    def __init__(
        self, config: ContinuousConfig, guesser: Callable[[], Guesser] = PromptLookup
    ) -> None:
        self.config = config
        self.guesses = 0
        self._new_guesser = guesser
        self.pool = BlockPool(config.kv_tokens // BLOCK_TOKENS)
        self.tier = Tier(
            self.pool,
            slots=config.tier_slots if config.prefix_cache else 0,
            stages=config.stages,
            store=config.tier_store,
        )
        # Those who wait for their turn to load, and those for whom a load is under way.
        self._wanting: dict[int, Sequence] = {}
        self._loading: dict[int, Sequence] = {}
        self._store: Copy | None = None
        self._short = False
        self._pressure = Pressure(config.step_tokens, config.max_running)
        self.max_in_flight = config.max_in_flight
        self.mixed_tokens = config.step_tokens

    def hashes(self) -> BlockHashes:
        return BlockHashes(self.config.root, BLOCK_TOKENS)

    def begin(self) -> None:
        self._store = self.tier.store(blocks_for(self.config.step_tokens))
        self._short = False

    def refusal(self, sequence: Sequence) -> str:
        if blocks_for(sequence.limit) <= self.pool.capacity:
            return ""
        return (
            f"prompt and answer may take {sequence.limit} tokens, "
            f"but this pipeline's KV cache holds {self.config.kv_tokens}"
        )

    def hopeless(self, _sequence: Sequence) -> str:
        return ""

    def admit(self, sequence: Sequence, running: Mapping[int, Sequence]) -> bool:
        if len(running) >= self._pressure.running:
            return False
        hits = self._find(sequence)
        pool, own = self.pool, self.config.storage == "own"
        kept = [block for block in hits if not own or pool.holders(block) == 0]
        copied = [block for block in hits if own and pool.holders(block) > 0]
        reserves = self.config.admission == "reserve"
        needed = blocks_for(sequence.limit if reserves else len(sequence.tokens)) - len(kept)
        # One block for each of the others, or letting somebody in would soon throw somebody out.
        spare = 0 if reserves else len(running)
        idle = sum(pool.holders(block) == 0 for block in kept)
        if needed + spare > pool.free - idle:
            self._short = True
            return False
        for block in (*kept, *copied):
            pool.hold(block)
        fresh = pool.allocate(needed)
        staying = set(kept)
        sequence.blocks = [block if block in staying else fresh.pop() for block in hits]
        sequence.blocks += reversed(fresh)
        sequence.hits, sequence.pinned = tuple(hits), copied
        sequence.sent = sequence.done = len(hits) * BLOCK_TOKENS
        # A copy is never found itself, as long as there is the original.
        sequence.registered = len(hits)
        names = self._names(sequence)
        self.tier.touch(names[: len(hits)])
        if self.tier.find(names[len(hits) : len(hits) + 1]):
            self._want(sequence)
        return True

    def compose(self, running: dict[int, Sequence], batch: Batch) -> list[Sequence]:
        preempted: list[Sequence] = []
        self._load(batch)
        decoding = sum(s.awaiting or s.can_decode for s in running.values())
        most = self._pressure.positions
        budget = min(self.mixed_tokens, most) if decoding else most
        share = min(-(-decoding // self.max_in_flight), most)
        for sequence in list(running.values()):
            if len(batch.rows) >= share:
                break
            if sequence in preempted or not sequence.can_decode or not batch.accepts(sequence):
                continue
            if self._grow(sequence, running, preempted):
                guesses = self._guess(sequence, batch) if share == 1 else []
                self._take(sequence, 1, running, batch, guesses)
        for sequence in list(running.values()):
            room = budget - len(batch.tokens)
            if room <= 0:
                break
            if sequence.prefill_left > 0 and sequence not in preempted and batch.accepts(sequence):
                chunk = min(sequence.prefill_left, self.config.prefill_chunk, room)
                self._take(sequence, chunk, running, batch)
        batch.store = self._store
        if batch.rows or self._short:
            # Not with a step of their own if it can be helped: a stage that is in trouble would
            # fail it at once again.
            batch.store = batch.store or self.tier.again("store")
            batch.load = batch.load or self.tier.again("load")
        return preempted

    def progressed(self, sequence: Sequence) -> None:
        full = sequence.done // BLOCK_TOKENS
        if self.config.prefix_cache and full > sequence.registered:
            names = sequence.hashes.of(sequence.tokens, full)
            for place in range(sequence.registered, full):
                self.pool.register(sequence.blocks[place], names[place])
            self.tier.filled(names[sequence.registered :])
            sequence.registered = full

    def ended(self, sequence: Sequence, *, intact: bool) -> None:
        if not intact:
            for block in sequence.blocks:
                self.pool.forget(block)
        self._give_back(sequence)

    def copied(self, event: int, stage: int, failed: Iterable[int]) -> list[Sequence]:
        broken = []
        for part, intact in self.tier.done(event, stage, failed):
            sequence = self._loading.pop(part.request, None)
            if sequence is None:
                continue
            if intact:
                sequence.sent = sequence.done = (part.place + len(part.blocks)) * BLOCK_TOKENS
                self.progressed(sequence)
                self._want(sequence)
            else:
                self._give_back(sequence)
                broken.append(sequence)
        return broken

    def starved(self, positions: int, running: int) -> bool:
        return self._pressure.shrink(positions, running)

    def be_careful(self) -> None:
        """Begin with smaller steps."""
        self._pressure.shrink(self._pressure.positions, 1)

    def eased(self) -> None:
        self._pressure.ease()

    def oldest_copy(self) -> int | None:
        return self.tier.oldest

    def lost(self, step: PlannedStep) -> list[int]:
        self.tier.lost(step.store)
        return [part.request for part in self.tier.lost(step.load)]

    def _find(self, sequence: Sequence) -> list[int]:
        return self.pool.find(self._names(sequence))

    def _names(self, sequence: Sequence) -> list[BlockHash]:
        """Of those blocks that need not be computed if somebody has them."""
        if not self.config.prefix_cache:
            return []
        # The last token must be fed in any case, since its logits are wanted.
        full = (len(sequence.tokens) - 1) // BLOCK_TOKENS
        return sequence.hashes.of(sequence.tokens, full)

    def _want(self, sequence: Sequence) -> None:
        sequence.loading = True
        self._wanting[sequence.number] = sequence

    def _load(self, batch: Batch) -> None:
        """Load for those who wait, as far as there is room; who finds nothing more may run."""
        room = MAX_LOADING_BLOCKS - self.tier.loads_under_way()
        parts = []
        for sequence in list(self._wanting.values()):
            if room <= 0:
                break
            del self._wanting[sequence.number]
            place = sequence.done // BLOCK_TOKENS
            slots = tuple(self.tier.find(self._names(sequence)[place : place + room]))
            if not slots:
                sequence.loading = False
                continue
            self._open(sequence, batch)
            blocks = tuple(sequence.blocks[place : place + len(slots)])
            parts.append(Part(sequence.number, place, blocks, slots))
            self._loading[sequence.number] = sequence
            room -= len(slots)
        if parts:
            batch.load = self.tier.load(parts)

    def _guess(self, sequence: Sequence, batch: Batch) -> list[int]:
        """As many as are allowed, and as have room in the step and in the blocks that it has."""
        if not self.guesses or has_penalties(sequence.sampling):
            return []
        known = len(sequence.tokens)
        most = min(
            self.guesses,
            sequence.limit - known - 1,
            len(sequence.blocks) * BLOCK_TOKENS - known,
            self._pressure.positions - len(batch.tokens) - 1,
        )
        if most <= 0:
            return []
        if sequence.guesser is None:
            sequence.guesser = self._new_guesser()
        guesses = sequence.guesser.guess(sequence.tokens, most)
        # Nothing follows the end, so there is nothing to run it for.
        end = next((i for i, token in enumerate(guesses) if token in sequence.eos), len(guesses))
        return guesses[:end]

    def _take(
        self,
        sequence: Sequence,
        count: int,
        running: dict[int, Sequence],
        batch: Batch,
        guesses: list[int] | None = None,
    ) -> None:
        self._open(sequence, batch)
        batch.take(sequence, count, sample=sequence.can_decode, guesses=guesses or ())
        # Those that were not served come first the next time.
        running[sequence.number] = running.pop(sequence.number)

    def _open(self, sequence: Sequence, batch: Batch) -> None:
        batch.open(sequence)
        self.pool.drop(sequence.pinned)
        sequence.pinned = []

    def _grow(
        self, sequence: Sequence, running: Mapping[int, Sequence], preempted: list[Sequence]
    ) -> bool:
        """Have a block for the next position; False if it must wait, or had to make room itself."""
        while sequence.sent >= len(sequence.blocks) * BLOCK_TOKENS:
            if self.pool.free:
                sequence.blocks += self.pool.allocate(1)
                return True
            if self.tier.copying:
                # Blocks come back by themselves.
                self._short = True
                return False
            behind = [
                s
                for s in running.values()
                if s.is_idle and s not in preempted and _place(s) >= _place(sequence)
            ]
            if not behind:
                return False
            victim = max(behind, key=_place)
            self._give_back(victim)
            preempted.append(victim)
            if victim is sequence:
                return False
        return True

    def _give_back(self, sequence: Sequence) -> None:
        self._wanting.pop(sequence.number, None)
        self._loading.pop(sequence.number, None)
        self.pool.drop(sequence.pinned)
        self.pool.drop(sequence.blocks)
        sequence.pinned, sequence.blocks = [], []


def _place(sequence: Sequence) -> tuple[int, int]:
    """The greatest makes room first. The smallest never has to, so it gets done.

    Who has made room ranks higher the next time, so that no number of urgent ones starves it.
    """
    return sequence.priority - sequence.preemptions, sequence.admitted
