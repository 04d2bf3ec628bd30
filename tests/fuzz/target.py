"""What is fuzzed, and stand-ins for where the bytes come from."""

import tempfile
from collections.abc import Callable, Coroutine
from pathlib import Path
from typing import Any, NamedTuple

from pxd.p2p.muxer import StreamClosed

PEER = "12D3KooWPjceQrSwdWXPyLLeABRXmuqt69Rg3sBYbU1Nft9HyQ6X"
KEY = b"k" * 32


class Target(NamedTuple):
    """`parse` may raise `refusals` for bytes that are no message, and nothing else."""

    name: str
    parse: Callable[[bytes], object]
    refusals: tuple[type[Exception], ...]
    examples: list[bytes]


def drive(coroutine: Coroutine[Any, Any, object]) -> object:
    """Run a coroutine that never really has to wait."""
    try:
        coroutine.send(None)
    except StopIteration as stop:
        return stop.value
    raise AssertionError("it waits")


class Bytes:
    """A stream whose bytes are all there; what is written to it is gone."""

    def __init__(self, data: bytes) -> None:
        self._data = data

    async def read_exactly(self, count: int) -> bytearray:
        if count > len(self._data):
            raise StreamClosed("the end")
        return bytearray(await self.read_some(count))

    async def read_some(self, limit: int) -> bytes:
        taken, self._data = self._data[:limit], self._data[limit:]
        return taken

    async def write(self, data: bytes) -> None:
        pass


def in_file(read: Callable[[Path], object], name: str = "file") -> Callable[[bytes], object]:
    """A parser of the content of a file; `read` is given its path."""
    directory = Path(tempfile.mkdtemp(dir="/dev/shm" if Path("/dev/shm").is_dir() else None))

    def parse(data: bytes) -> object:
        path = directory / name
        path.write_bytes(data)
        return read(path)

    return parse
