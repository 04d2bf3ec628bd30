"""Lends the files of this node's models to other members, chunk by chunk."""

import logging
from collections import OrderedDict
from collections.abc import Callable, Collection, Iterable
from functools import partial
from typing import TypeVar

import trio

from pxd.models.chunks import Chunk
from pxd.models.errors import ModelError
from pxd.models.files import ModelFiles, NotHere, stamp_of
from pxd.models.library import Library
from pxd.models.manifest import Manifest
from pxd.models.transfer import ASK_BYTES
from pxd.p2p.network import CallFailed, Network, NetworkError
from pxd.serving.weights.calls import (
    DIGESTS,
    NOT_HERE,
    OPEN,
    READ_CHUNKS,
    READ_SMALL,
    Digests,
    DigestsOf,
    Open,
    ReadChunks,
    ReadSmall,
    Sent,
    Which,
)
from pxd.wire import Weights

log = logging.getLogger("pxd.serving.weights")

READS_AT_ONCE = 8
READS_WHILE_BUSY = 1
OPENED_KEPT = 4
HASHED_AT_ONCE = 1

ResultT = TypeVar("ResultT")


class WeightsSource:
    """`announced()` names the models in this node's record, and nothing else is lent. While
    `busy()`, one chunk or so is on its way at a time, so that requests go first."""

    def __init__(
        self,
        network: Network,
        library: Library,
        announced: Callable[[], Collection[str]],
        busy: Callable[[], bool],
    ) -> None:
        self._network = network
        self._library = library
        self._announced = announced
        self._busy = busy
        self._opened: OrderedDict[str, ModelFiles] = OrderedDict()
        self._opening = trio.Lock()
        self._reads = trio.CapacityLimiter(READS_AT_ONCE)
        self._hashing = trio.CapacityLimiter(HASHED_AT_ONCE)
        network.serve(OPEN, self._on_open)
        network.serve(DIGESTS, self._on_digests)
        network.serve(READ_CHUNKS, self._on_read_chunks)
        network.serve(READ_SMALL, self._on_read_small)

    @property
    def lending(self) -> bool:
        return self._reads.borrowed_tokens > 0

    async def _on_open(self, _peer: str, request: Open) -> Manifest:
        return (await self._files(request.model)).manifest

    async def _files(self, name: str) -> ModelFiles:
        """The files as they are now. Raises `CallFailed`."""
        if name not in self._announced():
            raise CallFailed(NOT_HERE, "this node has no such model")
        async with self._opening:
            try:
                files = await _in_thread(self._look, name)
            except ModelError as error:
                raise CallFailed(NOT_HERE, str(error)) from error
            self._opened[name] = files
            self._opened.move_to_end(name)
            if len(self._opened) > OPENED_KEPT:
                self._opened.popitem(last=False)
            return files

    def _look(self, name: str) -> ModelFiles:
        directory = self._library.find(name)
        if directory is None:
            raise ModelError("this node does not have that model any more")
        known = self._opened.get(name)
        if known and known.directory == directory and known.stamp == stamp_of(directory):
            return known
        revision = self._library.revision(name, directory)
        return ModelFiles(directory, self._library.digests, revision)

    async def _of(self, which: Which) -> ModelFiles:
        """The files of the revision that is meant. Raises `CallFailed`."""
        files = self._opened.get(which.model)
        if files is None or files.manifest.identity != (which.fingerprint, which.mark):
            files = await self._files(which.model)
        if files.manifest.identity != (which.fingerprint, which.mark):
            raise CallFailed(NOT_HERE, "this node has another revision of that model")
        return files

    async def _on_digests(self, _peer: str, request: DigestsOf) -> Digests:
        files = await self._of(request.which)
        async with self._hashing:
            digests = await self._guarded(
                lambda: files.digests(
                    request.which.file, _chunks(files, request.which.file, request.chunks)
                )
            )
        return Digests(b"".join(digests))

    async def _on_read_chunks(self, peer: str, request: ReadChunks) -> Sent:
        files, file = await self._of(request.which), request.which.file

        def read() -> bytes:
            chunks = _chunks(files, file, request.chunks)
            if sum(chunk.size for chunk in chunks) > ASK_BYTES:
                raise CallFailed("too-much", f"at most {ASK_BYTES} bytes at once")
            return files.read(file, chunks)

        return await self._send(peer, request.number, read)

    async def _on_read_small(self, peer: str, request: ReadSmall) -> Sent:
        files = await self._of(request.which)
        read = partial(files.read_small, request.which.file, request.offset, request.size)
        return await self._send(peer, request.number, read)

    async def _send(self, peer: str, number: int, read: Callable[[], bytes]) -> Sent:
        busy = self._busy()
        self._reads.total_tokens = READS_WHILE_BUSY if busy else READS_AT_ONCE
        async with self._reads:
            data = await self._guarded(read)
            try:
                await self._network.send(peer, Weights(number=number, size=len(data)), data)
            except NetworkError as error:
                raise CallFailed("unreachable", str(error)) from error
            return Sent(busy)

    async def _guarded(self, call: Callable[[], ResultT]) -> ResultT:
        try:
            return await trio.to_thread.run_sync(call)
        except NotHere as error:
            raise CallFailed(NOT_HERE, str(error)) from error
        except OSError as error:
            log.warning("cannot read a model for another node: %s", error)
            raise CallFailed("unreadable", error.strerror or str(error)) from error


def _chunks(files: ModelFiles, file: str, indices: Iterable[int]) -> list[Chunk]:
    return [files.chunk(file, index) for index in indices]


async def _in_thread(call: Callable[[str], ResultT], name: str) -> ResultT:
    return await trio.to_thread.run_sync(call, name)
