"""Models that came from other nodes, each in a directory of its own that looks like any model's.

Weight files have their full size from the start and holes where nothing has come yet; the journals
beside them say what has. Everything here blocks and belongs into a worker thread.
"""

import errno
import hashlib
import os
import re
import shutil
import threading
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec

from pxd.models.chunks import Chunk, Grid, digest_of
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError, NoRoom
from pxd.models.files import read_chunk
from pxd.models.fingerprint import fingerprint
from pxd.models.journal import SIDE_DIRECTORY, UNKNOWN, Journal, journal_path
from pxd.models.manifest import Fingerprint, Manifest, WeightsFile
from pxd.models.safetensors import read_header
from pxd.wire import DECODE_ERRORS, Name

_WEIGHTS = "model*.safetensors"

LABEL = f"{SIDE_DIRECTORY}/model.json"

Piece = tuple[Chunk, memoryview, bytes]
"""A chunk, its bytes, and their digest, which must have been compared with what it should be."""


class KeptFiles:
    """One directory, to be filled by one caller at a time. Raises OSError where the disk does."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._filling = directory / SIDE_DIRECTORY / "filling"
        self._putting = threading.Lock()
        self._grids = {
            path.name: Grid(path.name, read_header(path), path.stat().st_size)
            for path in sorted(directory.glob(_WEIGHTS))
        }
        self._journals = {
            file: Journal(journal_path(directory, file), grid.count)
            for file, grid in self._grids.items()
        }

    def missing(self, tensors: Iterable[str]) -> list[Chunk]:
        """The chunks of `tensors` that are still to come."""
        names = frozenset(tensors)
        return [
            chunk
            for file, grid in self._grids.items()
            for chunk in grid.of(names)
            if self._journals[file][chunk.number] is None
        ]

    def tensor_of(self, chunk: Chunk) -> str:
        return self._grids[chunk.file].tensor_of(chunk.number)

    def size_of(self, tensors: Iterable[str]) -> int:
        names = frozenset(tensors)
        return sum(chunk.size for grid in self._grids.values() for chunk in grid.of(names))

    def all_in(self, weights: Iterable[WeightsFile]) -> bool:
        """Whether that is as many chunks as there are."""
        counts = {file.name: sum(count for _, count in file.held) for file in weights}
        return all(counts.get(file, 0) >= grid.count for file, grid in self._grids.items())

    def recover(self) -> int:
        """If filling ended in between, read again what seems to be here and forget what is damaged;
        returns how many chunks that were."""
        if not self._filling.exists():
            return 0
        return sum(self._forget_damaged(file) for file in self._grids)

    def begin(self) -> None:
        """To be called before anything is put."""
        self._filling.parent.mkdir(parents=True, exist_ok=True)
        self._filling.touch()

    def _forget_damaged(self, file: str) -> int:
        grid, journal = self._grids[file], self._journals[file]
        damaged = {}
        with (self.directory / file).open("rb") as opened:
            for index in range(grid.count):
                digest = journal[index]
                if digest is not None and digest_of(read_chunk(opened, grid[index])) != digest:
                    damaged[index] = UNKNOWN
        if damaged:
            journal.put(damaged)
        return len(damaged)

    def put(self, file: str, pieces: Sequence[Piece]) -> None:
        """Write chunks of one file, and only then that they are here. From any thread."""
        with self._putting:
            descriptor = os.open(self.directory / file, os.O_WRONLY)
            try:
                for chunk, data, _ in pieces:
                    _write(descriptor, data, chunk.offset)
            finally:
                os.close(descriptor)
            self._journals[file].put({chunk.number: digest for chunk, _, digest in pieces})

    def finish(self) -> None:
        """What was wanted is here: make it last."""
        if not self._filling.exists():
            return
        for file in self._grids:
            for path in (self.directory / file, journal_path(self.directory, file)):
                if path.exists():
                    _sync(path)
        self._filling.unlink()


def _write(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(descriptor, data, offset)
        data, offset = data[written:], offset + written


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


class Label(msgspec.Struct, frozen=True):
    """Which model a directory holds. Written last: without it, a directory is not complete."""

    name: Name
    fingerprint: Fingerprint
    mark: Fingerprint
    revision: Fingerprint = ""


class Store:
    """All of them, below `root`."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def place(self, name: str, model: "Manifest | Label") -> Path:
        """The directory for this very model, whether it exists or not."""
        content = msgspec.json.encode((name, model.fingerprint, model.mark))
        slug = re.sub(r"[^A-Za-z0-9.-]+", "-", name.rstrip("/").rpartition("/")[2]).strip("-.")
        return self._root / f"{slug[:60] or 'model'}-{hashlib.sha256(content).hexdigest()[:16]}"

    def workplace(self, name: str) -> Path:
        """An empty place for a new model, which `adopt` then takes; what was left there is gone."""
        self._root.mkdir(parents=True, exist_ok=True)
        place = self._workplace(name)
        shutil.rmtree(place, ignore_errors=True)
        return place

    def _workplace(self, name: str) -> Path:
        return self._root / f".{hashlib.sha256(name.encode()).hexdigest()[:16]}.part"

    def adopt(self, directory: Path, name: str) -> None:
        """Have the whole model that was made in `directory`, a `workplace`, among the others."""
        checkpoint = describe_checkpoint(directory)
        label = Label(name, checkpoint.fingerprint, fingerprint(directory))
        for path in sorted(directory.glob(_WEIGHTS)):
            _write_journal(directory, path)
            _sync(path)
        _label_path(directory).parent.mkdir(exist_ok=True)
        _replace(_label_path(directory), msgspec.json.encode(label))
        place = self.place(name, label)
        shutil.rmtree(place, ignore_errors=True)
        directory.rename(place)

    def find(self, name: str, fingerprint: str = "") -> Path | None:
        """The directory of a model, the latest if there are several; perhaps not all of it is
        here."""
        found = [
            directory
            for directory, label in self._labels()
            if label.name == name and fingerprint in ("", label.fingerprint)
        ]
        return max(found, key=_labelled_at, default=None)

    def names(self) -> list[str]:
        return sorted({label.name for _, label in self._labels()})

    def remove(self, name: str) -> int:
        """Delete all that is kept of a model; returns how many directories that were."""
        found = [directory for directory, label in self._labels() if label.name == name]
        for directory in found:
            # Nothing finds what is deleted by half.
            _label_path(directory).unlink()
            shutil.rmtree(directory)
        # What a kill -9 has left of making it.
        shutil.rmtree(self._workplace(name), ignore_errors=True)
        return len(found)

    def finish(self, directory: Path, name: str, manifest: Manifest) -> None:
        """The small files and all headers are in `directory`."""
        label = Label(name, *manifest.identity, manifest.revision)
        _label_path(directory).parent.mkdir(parents=True, exist_ok=True)
        _replace(_label_path(directory), msgspec.json.encode(label))

    def label(self, directory: Path) -> Label:
        """Raises `ModelError` where it cannot be read."""
        try:
            return msgspec.json.decode(_label_path(directory).read_bytes(), type=Label)
        except (*DECODE_ERRORS, OSError) as error:
            raise ModelError(f"{directory} is damaged: {error}") from error

    def _labels(self) -> Iterator[tuple[Path, Label]]:
        for path in sorted(self._root.glob(f"*/{LABEL}")):
            try:
                yield path.parents[1], msgspec.json.decode(path.read_bytes(), type=Label)
            except (*DECODE_ERRORS, FileNotFoundError):
                continue  # not written by this release, or just being deleted


def _write_journal(directory: Path, path: Path) -> None:
    """For a file that is whole and right."""
    grid = Grid(path.name, read_header(path), path.stat().st_size)
    with path.open("rb") as opened:
        digests = {chunk: digest_of(read_chunk(opened, grid[chunk])) for chunk in range(grid.count)}
    Journal(journal_path(directory, path.name), grid.count).put(digests)


def _label_path(directory: Path) -> Path:
    return directory / LABEL


def _labelled_at(directory: Path) -> int:
    try:
        return _label_path(directory).stat().st_mtime_ns
    except FileNotFoundError:
        return 0  # just being deleted


def put_small(directory: Path, name: str, data: bytes) -> None:
    """Write a metadata file, whole or not at all."""
    _replace(directory / name, data)


def put_head(directory: Path, file: WeightsFile, head: bytes) -> None:
    """Make a weights file that has its header, and holes behind it."""
    # If there was another one of that name, nothing that is known of it holds any more.
    journal_path(directory, file.name).unlink(missing_ok=True)
    _replace(directory / file.name, head, file.size)


def has_head(directory: Path, file: WeightsFile) -> bool:
    path = directory / file.name
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    with path.open("rb") as opened:
        return digest_of(opened.read(file.head)) == file.digest


def _replace(path: Path, data: bytes, size: int | None = None) -> None:
    temporary = path.with_name(f".{path.name}.part")
    with temporary.open("wb") as file:
        file.write(data)
        if size is not None:
            file.truncate(size)
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(path)


def disk_error(name: str, error: OSError) -> ModelError:
    """What the disk did not do, in words."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return NoRoom(f"no space left for {name}: free some, and it goes on by itself")
    return ModelError(f"{name} cannot be kept here: {error}")


def check_room(directory: Path, wanted: int) -> None:
    """Raises `ModelError` where `wanted` more bytes do not fit."""
    free = shutil.disk_usage(directory).free
    if free < wanted:
        raise NoRoom(
            f"no space left: {wanted / (1 << 30):.2f} GiB are to come and {directory} has room for "
            f"{free / (1 << 30):.2f} GiB; free some, and it goes on by itself"
        )
