"""What a stage that keeps each request's KV in one piece knows of the head's blocks.

The head names blocks; here it is tracked which piece of KV each of them lies in. A piece belongs to
one request, block i of its table at positions [i * BLOCK_TOKENS, (i + 1) * BLOCK_TOKENS), and
outlives it for as long as the head has not granted all of its blocks to others.
"""

from collections.abc import Iterable, Mapping

import msgspec

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.wire import Grant, Opening


class MirrorError(Exception):
    """What the head says does not fit what was said before; nothing has been changed."""


class Run(msgspec.Struct, frozen=True):
    """Blocks [`first`, `first` + `count`) of piece `piece`, one behind the other."""

    piece: int
    first: int
    count: int


class _Piece:
    __slots__ = ("blocks", "live", "open")

    def __init__(self) -> None:
        self.blocks: list[int] = []
        self.live = 0
        self.open = True


class BlockMirror:
    """Pieces are numbered anew with every opening, so that a request that comes back is another.

    Of a step apply `release`, then `check`, `open` for each opening, and `grant`, in this order.
    """

    def __init__(self) -> None:
        self._pieces: dict[int, _Piece] = {}
        self._of_request: dict[int, int] = {}
        self._where: dict[int, tuple[int, int]] = {}
        self._next = 0

    @property
    def pieces(self) -> int:
        return len(self._pieces)

    def piece_of(self, request: int) -> int:
        return self._of_request[request]

    def place_of(self, block: int) -> tuple[int, int] | None:
        """The piece that holds a block, and the block's number in it."""
        return self._where.get(block)

    def blocks_kept(self, piece: int) -> int:
        """Up to which block a piece still holds something: what is behind may be given up."""
        blocks = self._pieces[piece].blocks
        for place in reversed(range(len(blocks))):
            if self._where.get(blocks[place]) == (piece, place):
                return place + 1
        return 0

    def check(self, openings: Iterable[Opening], lengths: Mapping[int, int]) -> None:
        """Raises `MirrorError` unless all hits are there; `lengths` are the pieces' positions."""
        for opening in openings:
            if opening.cached != len(opening.hits) * BLOCK_TOKENS:
                raise MirrorError(f"{len(opening.hits)} blocks for {opening.cached} positions")
            for place, block in enumerate(opening.hits):
                piece, at = self._where.get(block, (-1, -1))
                if at != place or lengths.get(piece, 0) < (place + 1) * BLOCK_TOKENS:
                    raise MirrorError(f"block {block} does not hold block {place} of a prefix")

    def open(self, opening: Opening) -> list[Run]:
        """Begin the piece of a request; returns what to copy into it from its start."""
        runs: list[Run] = []
        for place, block in enumerate(opening.hits):
            piece, _ = self._where[block]
            if runs and runs[-1].piece == piece:
                runs[-1] = Run(piece, runs[-1].first, runs[-1].count + 1)
            else:
                runs.append(Run(piece, place, 1))
        self._pieces[self._next] = _Piece()
        self._of_request[opening.request] = self._next
        self._next += 1
        return runs

    def grant(self, grants: Iterable[Grant]) -> list[int]:
        """Give blocks their new places; returns pieces that hold nothing any more."""
        emptied = []
        for grant in grants:
            number = self._of_request.get(grant.request)
            if number is None:
                continue
            piece = self._pieces[number]
            for block in grant.blocks:
                emptied += self._take_away(block)
                self._where[block] = number, len(piece.blocks)
                piece.blocks.append(block)
                piece.live += 1
        return emptied

    def release(self, requests: Iterable[int]) -> list[int]:
        """The requests have ended; returns pieces that hold nothing. Unknown ones are ignored."""
        emptied = []
        for request in requests:
            number = self._of_request.pop(request, None)
            if number is not None:
                self._pieces[number].open = False
                emptied += self._drop_if_empty(number)
        return emptied

    def lose(self, request: int) -> None:
        """A request's piece is gone, with all that was in it."""
        number = self._of_request.pop(request)
        for place, block in enumerate(self._pieces.pop(number).blocks):
            if self._where.get(block) == (number, place):
                del self._where[block]

    def _take_away(self, block: int) -> list[int]:
        number, _ = self._where.pop(block, (-1, -1))
        if number not in self._pieces:
            return []
        self._pieces[number].live -= 1
        return self._drop_if_empty(number)

    def _drop_if_empty(self, number: int) -> list[int]:
        piece = self._pieces[number]
        if piece.open or piece.live:
            return []
        del self._pieces[number]
        return [number]
