"""Storage of the second KV tier: slots of bytes in a file, filled and read by a thread of its own.

The thread never touches tensors, which are bound to the thread of the engine: bytes are handed over
to be stored, and handed back when loaded. Whatever goes wrong with the file is a copy that failed.
"""

import logging
import os
import queue
import sys
import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec

from pxd.wire import Buffer, Copied

log = logging.getLogger("pxd.executors")

Report = Callable[[Copied], None]

STAT_BLOCK = 512
"""Bytes of what `stat` calls a block, whatever the file system's are."""


class SlotFile:
    """Slots of `slot_bytes` bytes. Takes space only for those that have been written to.

    The file has no name: it is gone with the process, however that ends.
    """

    def __init__(self, descriptor: int, slot_bytes: int, *, in_memory: bool = False) -> None:
        self._descriptor = descriptor
        self._in_memory = in_memory
        self._slot_bytes = slot_bytes
        self._written: set[int] = set()

    @classmethod
    def on_disk(cls, directory: Path, slot_bytes: int) -> "SlotFile":
        """Raises `OSError`."""
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory, buffering=0) as file:
            return cls(os.dup(file.fileno()), slot_bytes)

    @classmethod
    def in_memory(cls, slot_bytes: int) -> "SlotFile":
        """In the memory of the host. Raises `OSError` where that cannot be had."""
        if sys.platform != "linux":
            raise OSError("memory as a file is known on Linux only")
        return cls(os.memfd_create("pxd-kv-tier"), slot_bytes, in_memory=True)

    def __del__(self) -> None:
        os.close(self._descriptor)

    @property
    def memory_bytes(self) -> int:
        """What it takes of the host's memory, which no process's resident set says."""
        return os.fstat(self._descriptor).st_blocks * STAT_BLOCK if self._in_memory else 0

    def forget(self) -> None:
        """Nothing of what has been written will be asked for again."""
        self._written.clear()

    def write(self, slot: int, data: Buffer) -> None:
        """Raises `OSError`, after which the slot holds nothing."""
        self._written.discard(slot)
        view = memoryview(data).cast("B")
        if len(view) != self._slot_bytes:
            raise OSError(f"{len(view)} bytes for a slot of {self._slot_bytes}")
        done = 0
        while done < len(view):
            done += os.pwrite(self._descriptor, view[done:], slot * self._slot_bytes + done)
        self._written.add(slot)

    def read(self, slot: int) -> bytearray:
        """Raises `OSError`, also for a slot that holds nothing."""
        if slot not in self._written:
            raise OSError(f"nothing has been written to slot {slot}")
        data = bytearray(self._slot_bytes)
        view, done = memoryview(data), 0
        while done < len(data):
            count = os.preadv(self._descriptor, [view[done:]], slot * self._slot_bytes + done)
            if count == 0:
                raise OSError(f"slot {slot} has been cut off")
            done += count
        return data


class Wanted(msgspec.Struct, frozen=True):
    """Slots to be loaded for one request, into its blocks from `place` on. `owner` is its own."""

    owner: object
    place: int
    slots: tuple[int, ...]


class Loaded(msgspec.Struct, frozen=True):
    """What has been read of a `Wanted`, slot by slot."""

    wanted: Wanted
    data: Sequence[Buffer]


class Copier:
    """Carries out copies in order and reports each when it is done, from a thread of its own."""

    def __init__(self, file: SlotFile, report: Report) -> None:
        self._file = file
        self._report = report
        self._jobs: queue.SimpleQueue[Callable[[], None]] = queue.SimpleQueue()
        self._loaded: queue.SimpleQueue[Loaded] = queue.SimpleQueue()
        threading.Thread(target=self._run, name="kv-tier", daemon=True).start()

    @property
    def memory_bytes(self) -> int:
        return self._file.memory_bytes

    def store(self, done: Copied, blocks: Sequence[tuple[int, Buffer]]) -> None:
        """Write bytes to slots; `done` is reported, with those in it that failed already."""
        self._jobs.put(lambda: self._store(done, blocks))

    def load(self, done: Copied, wanted: Sequence[Wanted]) -> None:
        """Read slots, for `loaded` to return before `done` is reported."""
        self._jobs.put(lambda: self._load(done, wanted))

    def forget(self) -> None:
        """Nothing that was stored so far will be asked for again."""
        self._jobs.put(self._file.forget)

    def loaded(self) -> list[Loaded]:
        """What has been read since the last call. Each request's is whole, or missing."""
        found = []
        while True:
            try:
                found.append(self._loaded.get_nowait())
            except queue.Empty:
                return found

    def _run(self) -> None:
        while True:
            self._jobs.get()()

    def _store(self, done: Copied, blocks: Sequence[tuple[int, Buffer]]) -> None:
        failed = list(done.failed)
        for slot, data in blocks:
            try:
                self._file.write(slot, data)
            except (OSError, MemoryError) as error:
                log.warning("cannot write to the KV tier: %s", error)
                failed.append(slot)
        self._report(msgspec.structs.replace(done, failed=tuple(failed)))

    def _load(self, done: Copied, wanted: Sequence[Wanted]) -> None:
        failed = list(done.failed)
        for item in wanted:
            try:
                data = [self._read(slot) for slot in item.slots]
            except _Unreadable as error:
                failed.append(error.slot)
            else:
                self._loaded.put(Loaded(item, data))
        self._report(msgspec.structs.replace(done, failed=tuple(failed)))

    def _read(self, slot: int) -> bytearray:
        try:
            return self._file.read(slot)
        except (OSError, MemoryError) as error:
            log.warning("cannot read from the KV tier: %s", error)
            raise _Unreadable(slot) from error


class _Unreadable(Exception):
    def __init__(self, slot: int) -> None:
        super().__init__(slot)
        self.slot = slot
