"""A model directory opened chunk by chunk, to be lent to other nodes.

Everything here blocks and belongs into a worker thread.
"""

import hashlib
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import BinaryIO

from pxd.models.chunks import Chunk, Grid, digest_of
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.fingerprint import fingerprint
from pxd.models.journal import Journal, journal_path
from pxd.models.manifest import Manifest, describe_metadata, describe_weights, metadata_files
from pxd.models.safetensors import read_header

log = logging.getLogger("pxd.models")

Stamp = tuple[tuple[str, int, int], ...]


class NotHere(Exception):
    """This node does not have what was asked for."""


class ModelFiles:
    """The files as they were when this was made. `digests` is where digests are remembered of
    directories that are not pxd's own; a changed file has others. Raises `ModelError`."""

    def __init__(self, directory: Path, digests: Path, revision: str = "") -> None:
        self.directory = directory
        self.stamp = stamp_of(directory)
        self.checkpoint: Checkpoint = describe_checkpoint(directory)
        self._grids: dict[str, Grid] = {}
        self._journals: dict[str, Journal] = {}
        self._partial: dict[str, list[bool]] = {}
        present = sorted(set(self.checkpoint.shards.values()) - set(self.checkpoint.missing))
        try:
            for file in present:
                self._open(directory / file, digests)
            self.manifest = Manifest(
                fingerprint=self.checkpoint.fingerprint,
                mark=fingerprint(directory),
                revision=revision,
                files=describe_metadata(directory),
                weights=tuple(
                    describe_weights(directory / file, self._grids[file], self._held(file))
                    for file in present
                ),
            )
        except OSError as error:
            raise ModelError(f"{directory} cannot be read: {error}") from error
        self._sizes = {file.name: file.size for file in self.manifest.files}
        self._sizes |= {file.name: file.head for file in self.manifest.weights}

    def _open(self, path: Path, digests: Path) -> None:
        grid = Grid(path.name, read_header(path), path.stat().st_size)
        own = journal_path(self.directory, path.name)
        kept = own.parent.is_dir()
        journal = Journal(own if kept else digests / _key(path), grid.count)
        self._grids[path.name], self._journals[path.name] = grid, journal
        if kept:
            self._partial[path.name] = journal.held()

    def _held(self, file: str) -> list[bool]:
        partial = self._partial.get(file)
        return [True] * self._grids[file].count if partial is None else partial

    def chunk(self, file: str, index: int) -> Chunk:
        """Raises `NotHere`."""
        grid = self._grids.get(file)
        if grid is None or not 0 <= index < grid.count or not self._held_one(file, index):
            raise NotHere(f"chunk {index} of {file} is not here")
        return grid[index]

    def _held_one(self, file: str, index: int) -> bool:
        partial = self._partial.get(file)
        return partial is None or partial[index]

    def digests(self, file: str, chunks: Iterable[Chunk]) -> list[bytes]:
        """Of chunks of one file. Those that are not known yet are computed and remembered."""
        journal = self._journals[file]
        news: dict[int, bytes] = {}
        found = []
        with (self.directory / file).open("rb") as opened:
            for chunk in chunks:
                digest = journal[chunk.number]
                if digest is None:
                    digest = news[chunk.number] = digest_of(read_chunk(opened, chunk))
                found.append(digest)
        if news:
            try:
                journal.put(news)
            except OSError as error:
                log.info("the digests of %s cannot be remembered: %s", file, error)
        return found

    def read(self, file: str, chunks: Iterable[Chunk]) -> bytes:
        with (self.directory / file).open("rb") as opened:
            return b"".join(read_chunk(opened, chunk) for chunk in chunks)

    def read_small(self, file: str, offset: int, size: int) -> bytes:
        """Bytes of a metadata file, or of the header of weights. Raises `NotHere`."""
        if offset + size > self._sizes.get(file, -1):
            raise NotHere(f"there are no bytes [{offset}, {offset + size}) in {file}")
        with (self.directory / file).open("rb") as opened:
            return read_chunk(opened, Chunk(file, 0, offset, size))


def _key(path: Path) -> str:
    """Names a file with its size and time of change: of what was changed, nothing is known."""
    path = path.resolve()
    stat = path.stat()
    content = f"{path}\0{stat.st_size}\0{stat.st_mtime_ns}"
    return hashlib.sha256(content.encode(errors="surrogateescape")).hexdigest()


def read_chunk(opened: BinaryIO, chunk: Chunk) -> bytes:
    opened.seek(chunk.offset)
    data = opened.read(chunk.size)
    if len(data) < chunk.size:
        raise NotHere(f"{chunk.file} is shorter than it was")
    return data


def stamp_of(directory: Path) -> Stamp:
    """What changes when files of a model do. Raises `ModelError`."""
    try:
        paths = [*metadata_files(directory), *sorted(directory.glob("model*.safetensors"))]
        paths += sorted(journal_path(directory, "").parent.glob("*.chunks"))
        stats = ((path.name, path.stat()) for path in paths)
        return tuple((name, stat.st_size, stat.st_mtime_ns) for name, stat in stats)
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error
