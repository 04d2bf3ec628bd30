"""The passes of a step through a stage's layers: which rows run together, and where.

Rows of several positions, and those that draw nothing, run on the request's own caches. Rows that
decode one token run as batches; a single one runs on its own caches and so computes exactly what
`mlx_lm.generate_step` would. Rows with guesses run alone, in one pass.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import mlx.core as mx

from pxd.executors.mlx.batch import Request, batch_of, own_caches
from pxd.executors.mlx.decode import Draws
from pxd.executors.mlx.finite import is_finite, mark_of, not_finite_among
from pxd.executors.mlx.stage import Caches, Stage
from pxd.executors.protocol import Drawn
from pxd.executors.trouble import NotFinite
from pxd.wire import Row

MOST_SCORES = 1 << 32
"""Positions times positions before them times hidden size, of a pass on a CPU. Attention is not
fused there: for heads of 64 numbers this keeps its scores to 256 MiB, however long a prompt is."""


@dataclass(frozen=True)
class Part:
    """Positions [begin, end) of the step's tensor, which belong to one request."""

    request: Request
    position: int
    begin: int
    end: int


@dataclass(frozen=True)
class Parts:
    """What fills caches, what decodes one token, and what verifies guesses; each in row order."""

    fills: list[Part] = field(default_factory=list)
    decodes: list[Part] = field(default_factory=list)
    guesses: list[Part] = field(default_factory=list)


@dataclass(frozen=True)
class Pass:
    """What a pass gives, once `arrays` are evaluated.

    `hidden` is one array ``(positions, hidden)`` for each part; on a last stage there are `draws`
    instead, one for each position, or none for what only fills. `mark` tells whether what is sent
    on is finite.
    """

    parts: list[Part]
    hidden: list[mx.array]
    draws: Draws | None
    caches: Caches
    mark: mx.array | None = None

    @property
    def arrays(self) -> list[object]:
        """What is to be evaluated."""
        drawn = self.draws.arrays if self.draws is not None else []
        return [self.hidden, self.mark, drawn, [cache.state for cache in self.caches]]

    def check(self) -> None:
        """Raises `NotFinite` for the requests whose hidden states are not."""
        if self.mark is not None and not is_finite(self.mark):
            numbers = [self.parts[i].request.number for i in not_finite_among(self.hidden)]
            raise NotFinite("the hidden states", tuple(numbers))

    def tokens(self) -> list[tuple[int, list[Drawn]]]:
        """The place in the step's tensor, and what was drawn from there on."""
        if self.draws is None:
            return []
        drawn, offset, found = self.draws.tokens(), 0, []
        for part in self.parts:
            count = part.end - part.begin
            found.append((part.begin, drawn[offset : offset + count]))
            offset += count
        return found


class Passes:
    """Runs the passes of a step, one after the other."""

    def __init__(self, stage: Stage, *, batching: bool) -> None:
        """`batching`: whether requests can decode in batches."""
        self.stage = stage
        self._batching = batching

    def run(self, inputs: mx.array, parts: Parts) -> list[Pass]:
        """`inputs` are token ids ``(positions,)`` or hidden states ``(positions, hidden)``.

        Raises `NotFinite` where what is to be sent on is not; `Pass.tokens` does for tokens.
        """
        passes = []
        for build, groups in (
            (self._fill, [[piece] for part in parts.fills for piece in self._pieces(part)]),
            (self._verify, [[part] for part in parts.guesses]),
            # Last, for it may go on where a prompt ends.
            (self._decode, self._groups(parts.decodes)),
        ):
            for group in groups:
                passes.append(build(inputs, group))
                mx.eval(passes[-1].arrays)
                passes[-1].check()
        return passes

    def _pieces(self, part: Part) -> list[Part]:
        """The part, or where its attention would take too much memory, several in its place."""
        if mx.default_device().type != mx.DeviceType.cpu:
            return [part]
        seen = part.position + part.end - part.begin
        most = max(1, MOST_SCORES // (seen * max(1, self.stage.hidden_size)))
        return [
            Part(
                part.request, part.position + begin - part.begin, begin, min(begin + most, part.end)
            )
            for begin in range(part.begin, part.end, most)
        ]

    def _groups(self, decodes: list[Part]) -> list[list[Part]]:
        """Those that run together. A request without history has nothing to merge yet."""
        if not self._batching:
            return [[part] for part in decodes]
        alone = [[part] for part in decodes if part.position == 0]
        together = [part for part in decodes if part.position > 0]
        return [*alone, together] if together else alone

    def _fill(self, inputs: mx.array, group: list[Part]) -> Pass:
        [part] = group
        caches = own_caches(part.request)
        output = self.stage.forward(inputs[part.begin : part.end][None], caches)
        part.request.length += part.end - part.begin
        # On the last stage nobody needs the output, and so it is not computed.
        if self.stage.last:
            return Pass(group, [], None, caches)
        return Pass(group, [output[0]], None, caches, mark_of(output))

    def _verify(self, inputs: mx.array, group: list[Part]) -> Pass:
        """On a CPU, MLX 0.32.4 was seen to give the very bits of as many single steps, in bfloat16
        and float32. Other kernels may add up in another order; then a token may differ where two
        are as good as equally likely."""
        [part] = group
        request, caches = part.request, own_caches(part.request)
        output = self.stage.forward(inputs[part.begin : part.end][None], caches)
        count = part.end - part.begin
        request.length += count
        if not self.stage.last:
            return Pass(group, [output[0]], None, caches, mark_of(output))
        positions = range(part.position + 1, part.position + 1 + count)
        return Pass(group, [], Draws(output[0], [request] * count, positions), caches)

    def _decode(self, inputs: mx.array, group: list[Part]) -> Pass:
        requests = [part.request for part in group]
        rows = mx.array([part.begin for part in group])
        if len(group) == 1:
            caches = own_caches(requests[0])
            output = self.stage.forward(inputs[rows][:, None], caches)
        else:
            batch = batch_of(requests)
            caches = batch.caches
            places = {id(member): place for place, member in enumerate(batch.members)}
            order = [places[id(request)] for request in requests]
            rows = rows[mx.array(sorted(range(len(order)), key=order.__getitem__))]
            output = self.stage.forward(inputs[rows][:, None], caches)[mx.array(order)]
        for request in requests:
            request.length += 1
        if not self.stage.last:
            rows_out = [output[row] for row in range(len(group))]
            return Pass(group, rows_out, None, caches, mark_of(output))
        positions = [part.position + 1 for part in group]
        return Pass(group, [], Draws(output[:, -1, :], requests, positions), caches)


def parts_of(rows: Sequence[Row], requests: dict[int, Request]) -> Parts:
    """What the rows of a step are, with their places in its tensor."""
    parts = Parts()
    begin = 0
    for row in rows:
        request, end = requests[row.request], begin + row.count
        # The last position of a long row that draws is a decode like any other: the logits of the
        # positions before it are never needed.
        filled = end - row.draws
        if filled > begin:
            parts.fills.append(Part(request, row.position, begin, filled))
        if row.draws:
            part = Part(request, row.position + row.count - row.draws, filled, end)
            (parts.decodes if row.draws == 1 else parts.guesses).append(part)
        begin = end
    return parts
