"""Beginning a request with KV that other requests have left, as the head says.

Each request's KV is one piece, its own caches or a row of a batch's. When it ends, the piece is
kept for as long as the head may refer to any of its blocks. A new request gets copies.
"""

from collections.abc import Iterator, Mapping, Sequence

import mlx.core as mx
from mlx_lm.models.cache import KVCache

from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.engine.mirror import BlockMirror, MirrorError, Run
from pxd.executors.mlx.batch import Request, copy_of, own_caches, positions_of
from pxd.executors.mlx.stage import Caches
from pxd.executors.protocol import StepRejected
from pxd.wire import Opening, Step


def can_share_prefixes(caches: Caches) -> bool:
    """Whether positions can be taken out of these caches, all of which are one request's."""
    return all(type(cache) is KVCache for cache in caches)


class PrefixStore:
    """`requests` is the engine's own table, which this only reads."""

    def __init__(self, requests: Mapping[int, Request]) -> None:
        self._requests = requests
        self._mirror = BlockMirror()
        self._kept: dict[int, Caches] = {}

    @property
    def blocks_kept(self) -> int:
        """How many blocks there are of requests that have ended."""
        return sum(blocks_for(_length(caches)) for caches in self._kept.values())

    def check(self, step: Step) -> None:
        """Raises `StepRejected`, before anything is changed, for hits that are not here."""
        if not any(opening.hits for opening in step.openings):
            return
        lengths = {piece: _length(caches) for piece, caches in self._kept.items()}
        for number, request in self._requests.items():
            lengths[self._mirror.piece_of(number)] = request.length
        try:
            self._mirror.check(step.openings, lengths)
        except MirrorError as error:
            openings = tuple(opening.request for opening in step.openings)
            raise StepRejected("bad-step", str(error), openings) from error

    def open(self, opening: Opening, fresh: Caches) -> Caches:
        """The caches of a new request; `fresh` ones where nothing is to be copied."""
        by_piece = self._by_piece()
        parts: list[tuple[Run, Caches]] = []
        for run in self._mirror.open(opening):
            held = self._kept.get(run.piece)
            parts.append((run, copy_of(by_piece[run.piece]) if held is None else held))
        for place, cache in enumerate(fresh if parts else ()):
            cache.state = _joined([(run, caches[place]) for run, caches in parts])
        if parts:
            # Or what is copied from could not be freed.
            mx.eval([cache.state for cache in fresh])
        return fresh

    def blocks(self, blocks: Sequence[int]) -> list[list[mx.array]]:
        """Keys and values of each block's positions, by turns; empty for what is not here."""
        found: list[list[mx.array]] = []
        for request, piece, place in self._places(blocks):
            begin, end = place * BLOCK_TOKENS, (place + 1) * BLOCK_TOKENS
            kept = self._kept.get(piece, [])
            length = _length(kept) if request is None else request.length
            if length < end or place < 0:
                found.append([])
            elif request is None or request.batch is None:
                caches = kept if request is None else own_caches(request)
                found.append(positions_of(caches, 0, begin, end))
            else:
                row = request.batch.members.index(request)
                found.append(positions_of(request.batch.caches, row, begin, end))
        return found

    def owners(self, blocks: Sequence[int]) -> list[tuple[Request | None, int]]:
        """The open request in whose piece each block lies, and its place there."""
        return [(request, place) for request, _, place in self._places(blocks)]

    def _places(self, blocks: Sequence[int]) -> Iterator[tuple[Request | None, int, int]]:
        by_piece = self._by_piece()
        for block in blocks:
            piece, place = self._mirror.place_of(block) or (-1, -1)
            yield by_piece.get(piece), piece, place

    def _by_piece(self) -> dict[int, Request]:
        return {self._mirror.piece_of(number): r for number, r in self._requests.items()}

    def grant(self, step: Step) -> None:
        for piece in self._mirror.grant(step.grants):
            del self._kept[piece]
        if step.grants:
            self._shrink()

    def release(self, request: Request) -> None:
        """To be called before the request's caches are dropped."""
        piece = self._mirror.piece_of(request.number)
        if not self._mirror.release([request.number]):
            self._kept[piece] = own_caches(request)

    def lose(self, request: int) -> None:
        """The request's caches are gone."""
        self._mirror.lose(request)

    def clear(self) -> None:
        """A new head session knows nothing of what was here; there are no requests any more."""
        self._mirror = BlockMirror()
        self._kept.clear()

    def _shrink(self) -> None:
        """Give up what is behind the last block that is wanted, once that is half of a piece."""
        for piece, caches in self._kept.items():
            wanted = self._mirror.blocks_kept(piece) * BLOCK_TOKENS
            # A request that has left before it had anything has no arrays yet.
            if _length(caches) and wanted * 2 <= caches[0].keys.shape[2]:
                for cache in caches:
                    cache.state = (
                        mx.contiguous(cache.keys[..., :wanted, :]),
                        mx.contiguous(cache.values[..., :wanted, :]),
                        min(wanted, cache.offset),
                    )
                mx.eval([cache.state for cache in caches])


def _length(caches: Caches) -> int:
    return caches[0].offset if caches else 0


def _joined(parts: list[tuple[Run, KVCache]]) -> tuple[mx.array, mx.array, int]:
    keys, values = [], []
    for run, cache in parts:
        begin, end = run.first * BLOCK_TOKENS, (run.first + run.count) * BLOCK_TOKENS
        keys.append(cache.keys[..., begin:end, :])
        values.append(cache.values[..., begin:end, :])
    joined = mx.concatenate(keys, axis=2)
    return joined, mx.concatenate(values, axis=2), joined.shape[2]
