"""How the weights of a model are cut into chunks, each of which travels and is verified alone.

Every tensor is cut by itself, so that a stage needs no byte of tensors that are not its own. The
cuts follow from a file's header: two nodes with the same header have the same chunks.
"""

import hashlib
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping
from typing import NamedTuple

from pxd.models.safetensors import TensorInfo

CHUNK_BYTES = 256 << 10
DIGEST_BYTES = 32


class Chunk(NamedTuple):
    """Bytes [offset, offset + size) of `file`, the `number`th chunk of it."""

    file: str
    number: int
    offset: int
    size: int


def digest_of(data: bytes | bytearray | memoryview) -> bytes:
    return hashlib.blake2b(data, digest_size=DIGEST_BYTES).digest()


class Grid:
    """All chunks of one safetensors file of `size` bytes; its header must have been checked."""

    def __init__(self, file: str, header: Mapping[str, TensorInfo], size: int) -> None:
        self.file = file
        self.head_bytes = size - sum(tensor.nbytes for tensor in header.values())
        self._names: list[str] = []
        self._firsts: list[int] = []
        self._spans: list[tuple[int, int]] = []
        self._places: dict[str, int] = {}
        self.count = 0
        for name, tensor in sorted(header.items(), key=lambda item: item[1].data_offsets):
            if tensor.nbytes:
                self._places[name] = len(self._names)
                self._names.append(name)
                self._firsts.append(self.count)
                self._spans.append((self.head_bytes + tensor.data_offsets[0], tensor.nbytes))
                self.count += -(-tensor.nbytes // CHUNK_BYTES)

    def __getitem__(self, index: int) -> Chunk:
        """Raises IndexError."""
        if not 0 <= index < self.count:
            raise IndexError(f"{self.file} has {self.count} chunks")
        place = self._place(index)
        begin, size = self._spans[place]
        skipped = (index - self._firsts[place]) * CHUNK_BYTES
        return Chunk(self.file, index, begin + skipped, min(CHUNK_BYTES, size - skipped))

    def _place(self, index: int) -> int:
        return bisect_right(self._firsts, index) - 1

    def tensor_of(self, index: int) -> str:
        return self._names[self._place(index)]

    def of(self, tensors: Iterable[str]) -> Iterator[Chunk]:
        """The chunks of those of `tensors` that are in this file, in the file's order."""
        places = sorted(self._places[name] for name in tensors if name in self._places)
        return (self[index] for place in places for index in self._indices(place))

    def lacking(self, held: Iterable[bool]) -> Iterator[str]:
        """Tensors of which some chunk is not held; `held` is one for each chunk."""
        known = list(held)
        for place, name in enumerate(self._names):
            if not all(known[index] for index in self._indices(place)):
                yield name

    def _indices(self, place: int) -> range:
        first = self._firsts[place]
        return range(first, first - (-self._spans[place][1] // CHUNK_BYTES))
