"""A model of a pipeline that checks every step it is given and answers by arithmetic."""

import random
from collections.abc import Sequence

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.engine.mirror import BlockMirror
from pxd.engine.scheduler import NewRequest, PlannedStep
from pxd.wire import SampledToken, Sampling

GREEDY = Sampling(temperature=0)
EOS = 7


def request(
    number: int,
    tokens: list[int] | range,
    max_new: int,
    *,
    sampling: Sampling = GREEDY,
    **more: object,
) -> NewRequest:
    return NewRequest(
        number=number,
        tokens=list(tokens),
        max_new=max_new,
        sampling=sampling,
        **more,  # type: ignore[arg-type]
    )


def next_token(tokens: list[int]) -> int:
    """Depends on every token before it, so that a wrong prefix makes a wrong answer."""
    value = 17
    for token in tokens:
        value = (value * 31 + token + 1) % 99_991
    return 100 + value


def answer(tokens: list[int] | range, count: int) -> list[int]:
    """What the model generates, were it alone."""
    known = list(tokens)
    for _ in range(count):
        known.append(next_token(known))
    return known[len(list(tokens)) :]


class Oracle:
    """Guesses right for a while, and then, on purpose, wrong."""

    def guess(self, tokens: Sequence[int], most: int) -> list[int]:
        dice = random.Random(tokens[-1])
        count, right = dice.randint(0, most), dice.randint(0, most)
        wrong = [dice.choice([0, EOS])] * count
        return [*answer(list(tokens), min(count, right)), *wrong][:count]

    def learn(self, guessed: int, right: int) -> None:
        assert 0 <= right <= guessed


class Pipeline:
    """Runs steps in order, as stages do that keep each request's KV in one piece.

    What it holds is the tokens themselves. Insists on gapless positions, known requests, and on
    blocks that hold what the head believes. Draws EOS where `ends` has the length reached.
    """

    def __init__(self, ends: dict[int, int] | None = None, capacity: int | None = None) -> None:
        self.mirror = BlockMirror()
        self.pieces: dict[int, list[int]] = {}
        self.open: dict[int, int] = {}
        self.guessed: dict[int, int] = {}
        self.tables: dict[int, list[int]] = {}
        self.ends = ends or {}
        self.capacity = capacity
        self.copied = 0

    def run(self, step: PlannedStep) -> list[SampledToken]:
        self._forget(step)
        self.mirror.check(step.openings, {k: len(v) for k, v in self.pieces.items()})
        for opening in step.openings:
            assert opening.request not in self.open
            runs = self.mirror.open(opening)
            number = self.mirror.piece_of(opening.request)
            self.pieces[number] = [
                token
                for run in runs
                for token in self.pieces[run.piece][
                    run.first * BLOCK_TOKENS : (run.first + run.count) * BLOCK_TOKENS
                ]
            ]
            assert len(self.pieces[number]) == opening.cached
            self.copied += opening.cached
            self.open[opening.request] = number
            self.tables[opening.request] = []
        for grant in step.grants:
            self.tables[grant.request] += grant.blocks
        for piece in self.mirror.grant(step.grants):
            del self.pieces[piece]
        self._check_blocks()
        assert self.mirror.pieces == len(self.pieces)
        return self._compute(step)

    def _forget(self, step: PlannedStep) -> None:
        for request in step.releases:
            self.open.pop(request, None)
            self.guessed.pop(request, None)
            self.tables.pop(request, None)
        for piece in self.mirror.release(step.releases):
            del self.pieces[piece]

    def _check_blocks(self) -> None:
        """Nobody's block is somebody else's, and none is beyond what there is."""
        held = [block for table in self.tables.values() for block in table]
        assert len(held) == len(set(held))
        if self.capacity is not None:
            assert all(0 <= block < self.capacity for block in held)

    def _compute(self, step: PlannedStep) -> list[SampledToken]:
        assert sum(row.count for row in step.rows) == len(step.tokens)
        sampled, offset = [], 0
        for row in step.rows:
            known = self.pieces[self.open[row.request]]
            assert 0 <= len(known) - row.position <= self.guessed.pop(row.request, 0)
            del known[row.position :]
            known.extend(step.tokens[offset : offset + row.count])
            offset += row.count
            assert len(known) <= len(self.tables[row.request]) * BLOCK_TOKENS
            assert row.draws <= row.count
            for place in range(len(known) - row.draws + 1, len(known) + 1):
                ends = self.ends.get(row.request) == place
                token = EOS if ends else next_token(known[:place])
                sampled.append(SampledToken(row.request, place, token))
            if row.draws > 1:
                self.guessed[row.request] = row.draws - 1
        return sampled
