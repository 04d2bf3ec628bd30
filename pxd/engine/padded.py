"""The padded-batch policy: all running requests share one position, as static accelerators want it.

After vllm-spyre's continuous batching. Sequences are padded on the left so that all end at position
`tkv`; a step is one prefill or one decode of all. KV is counted in blocks of `BLOCK` positions, and
what is wholly padding costs nothing. A request is let in only if its last token will fit.
"""

from collections.abc import Iterable, Mapping

import msgspec

from pxd.engine.hashing import BlockHashes
from pxd.engine.requests import Sequence
from pxd.engine.scheduler import Batch, PlannedStep


class PaddedConfig(msgspec.Struct, frozen=True, kw_only=True):
    """`available_blocks` of `block` positions each, and `max_batch_tkv`, the most that batch size
    times `tkv` may ever be, are unbounded where None."""

    max_running: int
    max_model_len: int
    block: int = 64
    available_blocks: int | None = None
    max_batch_tkv: int | None = None


class _Seat:
    """A running sequence's place: `left` positions of padding, and `last`, where `tkv` will be when
    its last token is drawn."""

    __slots__ = ("last", "left")

    def __init__(self, left: int, last: int) -> None:
        self.left, self.last = left, last

    def shift(self, positions: int) -> None:
        self.left += positions
        self.last += positions


class Padded:
    """See `pxd.engine.scheduler.Policy`. `tkv`, `reserved` and `used` are as of the latest step."""

    max_in_flight = 1

    def __init__(self, config: PaddedConfig) -> None:
        self.config = config
        self.tkv = 0
        self._seats: dict[int, _Seat] = {}
        self._leaving: list[int] = []
        self._joining: Sequence | None = None

    @property
    def reserved(self) -> int:
        return sum(self._blocks(seat.left, seat.last) for seat in self._seats.values())

    @property
    def used(self) -> int:
        return sum(self._blocks(seat.left, self.tkv) for seat in self._seats.values())

    def hashes(self) -> BlockHashes:
        return BlockHashes(b"", self.config.block)

    def begin(self) -> None:
        """What ended with the last step is released; then the batch moves left if it can."""
        for number in self._leaving:
            del self._seats[number]
        self._leaving.clear()
        self._joining = None
        if not self._seats:
            self.tkv = 0
            return
        padded = min(seat.left for seat in self._seats.values()) // self.config.block
        self._shift(-padded * self.config.block)

    def refusal(self, sequence: Sequence) -> str:
        """Judged for the best place that it could get, in a batch that is as far as its prompt."""
        return self._flaw(self._seat(sequence, len(sequence.tokens)))

    def hopeless(self, sequence: Sequence) -> str:
        tkv = self._rounded(len(sequence.tokens))
        flaw = self._flaw(self._seat(sequence, tkv))
        return f"it does not fit into an empty batch: {flaw}" if flaw else ""

    def _flaw(self, seat: _Seat) -> str:
        config, blocks = self.config, self._blocks(seat.left, seat.last)
        if seat.last > config.max_model_len:
            return f"prompt and answer reach position {seat.last} of {config.max_model_len}"
        if config.available_blocks is not None and blocks > config.available_blocks:
            return f"prompt and answer take {blocks} of {config.available_blocks} blocks"
        if config.max_batch_tkv is not None and seat.last > config.max_batch_tkv:
            return f"its volume of {seat.last} is beyond {config.max_batch_tkv}"
        return ""

    def admit(self, sequence: Sequence, running: Mapping[int, Sequence]) -> bool:
        if self._joining is not None or len(running) >= self.config.max_running:
            return False
        prompt = len(sequence.tokens)
        tkv = self.tkv if self._seats else self._rounded(prompt)
        shift = self._rounded(max(0, prompt - tkv))
        seat = self._seat(sequence, tkv + shift)
        if not self._fits(seat, shift):
            return False
        self.tkv = tkv
        self._shift(shift)
        self._seats[sequence.number] = seat
        self._joining = sequence
        return True

    def compose(self, running: dict[int, Sequence], batch: Batch) -> list[Sequence]:
        if self._joining is not None:
            batch.take(self._joining, len(self._joining.tokens), sample=True)
        elif running:
            self.tkv += 1
            for sequence in running.values():
                batch.take(sequence, 1, sample=True)
        return []

    def progressed(self, _sequence: Sequence) -> None:
        pass

    def ended(self, sequence: Sequence, *, intact: bool) -> None:  # noqa: ARG002
        self._leaving.append(sequence.number)

    def copied(self, event: int, stage: int, failed: Iterable[int]) -> list[Sequence]:  # noqa: ARG002
        return []

    def starved(self, positions: int, running: int) -> bool:  # noqa: ARG002
        return False

    def eased(self) -> None:
        pass

    def oldest_copy(self) -> int | None:
        return None

    def lost(self, step: PlannedStep) -> list[int]:  # noqa: ARG002
        return []

    def _fits(self, seat: _Seat, shift: int) -> bool:
        config = self.config
        # All move together, so nobody's number of blocks changes.
        lasts = [seat.last, *(other.last + shift for other in self._seats.values())]
        if max(lasts) > config.max_model_len:
            return False
        blocks = self.reserved + self._blocks(seat.left, seat.last)
        if config.available_blocks is not None and blocks > config.available_blocks:
            return False
        return config.max_batch_tkv is None or _volume(lasts) <= config.max_batch_tkv

    def _seat(self, sequence: Sequence, tkv: int) -> _Seat:
        prompt = len(sequence.tokens)
        return _Seat(tkv - prompt, tkv + sequence.limit - prompt - 1)

    def _shift(self, positions: int) -> None:
        self.tkv += positions
        for seat in self._seats.values():
            seat.shift(positions)

    def _blocks(self, left: int, end: int) -> int:
        return self._up(end) - left // self.config.block

    def _rounded(self, positions: int) -> int:
        return self._up(positions) * self.config.block

    def _up(self, positions: int) -> int:
        return -(-positions // self.config.block)


def _volume(lasts: Iterable[int]) -> int:
    """The greatest batch size times `tkv` to come, as the batch shrinks when its shorter members
    end."""
    ordered = sorted(lasts)
    return max((len(ordered) - i) * last for i, last in enumerate(ordered))
