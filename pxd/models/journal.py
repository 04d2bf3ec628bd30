"""The digests of a file's chunks, kept beside it: what is verified survives a kill -9.

A journal is one digest for each chunk, one after the other; zeros stand for what is not known.
"""

import os
from pathlib import Path

from pxd.models.chunks import DIGEST_BYTES

UNKNOWN = bytes(DIGEST_BYTES)
SIDE_DIRECTORY = ".pxd"
"""In a directory that pxd has fetched from other nodes, where the journals are."""


def journal_path(directory: Path, file: str) -> Path:
    return directory / SIDE_DIRECTORY / f"{file}.chunks"


class Journal:
    """Blocks. Raises OSError where the file cannot be read or written."""

    def __init__(self, path: Path, count: int) -> None:
        self._path = path
        try:
            data = path.read_bytes()
        except FileNotFoundError:
            data = b""
        size = count * DIGEST_BYTES
        # One of another length is of another file: nothing in it can be true.
        self._digests = bytearray(data if len(data) == size else size)

    def __getitem__(self, index: int) -> bytes | None:
        found = bytes(self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])
        return None if found == UNKNOWN else found

    def __len__(self) -> int:
        return len(self._digests) // DIGEST_BYTES

    def held(self) -> list[bool]:
        return [self[index] is not None for index in range(len(self))]

    def put(self, digests: dict[int, bytes]) -> None:
        """Write digests down; `UNKNOWN` forgets one."""
        self._path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if os.fstat(descriptor).st_size != len(self._digests):
                os.ftruncate(descriptor, 0)
                os.ftruncate(descriptor, len(self._digests))
            for index, digest in digests.items():
                os.pwrite(descriptor, digest, index * DIGEST_BYTES)
                self._digests[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES] = digest
        finally:
            os.close(descriptor)
