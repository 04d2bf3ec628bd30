"""Fetches models that this node lacks from members that have them."""

import logging
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TypeVar

import trio

from pxd.models import kept
from pxd.models.chunks import digest_of
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.kept import KeptFiles, Store
from pxd.models.manifest import Manifest, MetadataFile, WeightsFile, layout, one_revision
from pxd.models.transfer import ASK_BYTES
from pxd.p2p.network import Network, NetworkError
from pxd.serving.readiness import Members
from pxd.serving.weights.arrivals import Arrivals
from pxd.serving.weights.calls import OPEN, READ_SMALL, Open, ReadSmall, Which
from pxd.serving.weights.run import Progress, Run

log = logging.getLogger("pxd.serving.weights")

OPEN_TIMEOUT_S = 30.0
ASKED_AT_ONCE = 8

ResultT = TypeVar("ResultT")
Enough = Callable[[Mapping[str, Manifest]], bool]


class NobodyHas(ModelError):
    """No member that can be reached has that model."""


class WeightsFetch:
    """`leader()` is believed where as many sources say one thing as the other, of files that were
    changed at the same time; `busy()` says that this node serves requests, which then go first.
    `came()` is called when there is a new model to be lent to others."""

    def __init__(
        self,
        network: Network,
        store: Store,
        members: Callable[[], Members],
        leader: Callable[[], str | None],
        busy: Callable[[], bool],
        came: Callable[[], None],
    ) -> None:
        self._network = network
        self._store = store
        self._members = members
        self._leader = leader
        self._busy = busy
        self._came = came
        self._locks: dict[str, trio.Lock] = {}
        self.arrivals = Arrivals(network)

    def holders(self, name: str) -> list[str]:
        """Members that say that they have something of a model, the leader first."""
        leader = self._leader()
        found = [
            peer
            for peer, member in self._members().items()
            if member.state in ("alive", "suspect")
            and peer != self._network.peer_id
            and any(model.name == name for model in member.record.models)
        ]
        return sorted(found, key=lambda peer: (peer != leader, peer))

    def name_of(self, peer: str) -> str:
        member = self._members().get(peer)
        return member.record.name if member else peer

    async def metadata(self, name: str, fingerprint: str = "") -> Path:
        """A directory that has all but the weights of a model. Raises `ModelError`."""
        async with self._turn(name):
            return await self._metadata(name, fingerprint)

    async def layers(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: Progress
    ) -> Path:
        """A directory that has what a stage of layers [start, end) needs, the last one for None.

        Only that travels, and only what is not here yet. Raises `ModelError`.
        """
        async with self._turn(name):
            with _disk_errors(name):
                return await self._layers(name, fingerprint, start, end, progress)

    def _turn(self, name: str) -> trio.Lock:
        return self._locks.setdefault(name, trio.Lock())

    async def sources(self, name: str, fingerprint: str, enough: Enough) -> dict[str, Manifest]:
        """Whom to fetch one revision of a model from, and what each of them has of it."""
        found = await self._found(name, lambda found: enough(one_revision(found, fingerprint)))
        return one_revision(found, fingerprint)

    async def _found(self, name: str, enough: Enough) -> dict[str, Manifest]:
        """What members have of a model, of whichever revision; the leader first.

        In a large cluster most have just a part, so that more are asked until it is `enough`.
        """
        answers: dict[str, Manifest] = {}

        async def look(peer: str) -> None:
            try:
                call = self._network.call
                manifest = await call(peer, OPEN, Open(name), timeout=OPEN_TIMEOUT_S)
            except NetworkError as error:
                log.info("%s cannot lend %s: %s", self.name_of(peer), name, error)
                return
            if flaw := manifest.flaw():
                log.warning("%s cannot lend %s: %s", self.name_of(peer), name, flaw)
            else:
                answers[peer] = manifest

        holders = self.holders(name)
        for first in range(0, len(holders), ASKED_AT_ONCE):
            async with trio.open_nursery() as nursery:
                for peer in holders[first : first + ASKED_AT_ONCE]:
                    nursery.start_soon(look, peer)
            if enough(answers):
                break
        return {peer: answers[peer] for peer in holders if peer in answers}

    async def _metadata(
        self, name: str, fingerprint: str, lacking: frozenset[str] = frozenset()
    ) -> Path:
        """With the headers of the files `lacking`, if anybody has them."""

        def enough(found: Mapping[str, Manifest]) -> bool:
            sources = one_revision(found, fingerprint)
            return bool(sources) and lacking <= {file.name for file in layout(sources.values())}

        found = await self._found(name, enough)
        while sources := one_revision(found, fingerprint):
            with _disk_errors(name):
                directory = await self._fetch_metadata(name, sources)
            if directory is not None:
                self._came()
                return directory
            # They said one thing and have another.
            found = {peer: each for peer, each in found.items() if peer not in sources}
        raise NobodyHas(f"no node that can be reached has {name}")

    async def _fetch_metadata(self, name: str, sources: Mapping[str, Manifest]) -> Path | None:
        """None if what has come is not what was said to come."""
        manifest = next(iter(sources.values()))
        directory = self._store.place(name, manifest)
        await _in_thread(partial(directory.mkdir, parents=True, exist_ok=True))
        weights = layout(sources.values())
        small = sum(f.size for f in manifest.files) + sum(f.head for f in weights)
        await _in_thread(partial(kept.check_room, directory, small))
        for file in manifest.files:
            await self._fetch_file(name, sources, directory, file)
        for head in weights:
            await self._fetch_head(name, sources, directory, head)
        found = await _in_thread(partial(describe_checkpoint, directory))
        if found.fingerprint != manifest.fingerprint:
            names = ", ".join(map(self.name_of, sources))
            log.error("%s: what came from %s is not what was said to come", name, names)
            await _in_thread(partial(shutil.rmtree, directory))
            return None
        await _in_thread(partial(self._store.finish, directory, name, manifest))
        return directory

    async def _fetch_file(
        self, name: str, sources: Mapping[str, Manifest], directory: Path, file: MetadataFile
    ) -> None:
        path = directory / file.name
        if await _in_thread(partial(_has, path, file)):
            return
        havers = [peer for peer, manifest in sources.items() if file in manifest.files]
        data = await self._read_small(name, sources, havers, file.name, file.size, file.digest)
        await _in_thread(partial(kept.put_small, directory, file.name, data))

    async def _fetch_head(
        self, name: str, sources: Mapping[str, Manifest], directory: Path, file: WeightsFile
    ) -> None:
        if await _in_thread(partial(kept.has_head, directory, file)):
            return
        havers = [
            peer
            for peer, manifest in sources.items()
            if any(each.digest == file.digest for each in manifest.weights)
        ]
        data = await self._read_small(name, sources, havers, file.name, file.head, file.digest)
        await _in_thread(partial(kept.put_head, directory, file, data))

    async def _read_small(
        self,
        name: str,
        sources: Mapping[str, Manifest],
        havers: list[str],
        file: str,
        size: int,
        digest: bytes,
    ) -> bytes:
        """From the first of `havers` that gives what has `digest`. Raises `ModelError`."""
        why = "nobody has it"
        for peer in havers:
            which = Which(name, *sources[peer].identity, file)
            data = bytearray()
            try:
                while len(data) < size:
                    part = min(size - len(data), ASK_BYTES)
                    make = partial(_small, which, len(data), part)
                    data += (await self.arrivals.ask(peer, READ_SMALL, make, part))[0]
            except NetworkError as error:
                why = f"{self.name_of(peer)}: {error}"
                continue
            if digest_of(data) == digest:
                return bytes(data)
            why = f"what {self.name_of(peer)} sent is damaged"
            log.error("%s of %s: %s", file, name, why)
        raise ModelError(f"{file} of {name} cannot be fetched: {why}")

    async def _layers(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: Progress
    ) -> Path:
        directory = await _in_thread(partial(self._store.find, name, fingerprint))
        if directory is None or not await _in_thread(partial(_is_sound, directory)):
            progress(0.0, "fetching configuration and tokenizer")
            directory = await self._metadata(name, fingerprint)
        checkpoint = await _in_thread(partial(describe_checkpoint, directory))
        last = checkpoint.layers if end is None else end
        if lacking := _without_header(checkpoint, start, last):
            # When the headers were fetched, nobody had those of these files.
            directory = await self._metadata(name, checkpoint.fingerprint, lacking)
            checkpoint = await _in_thread(partial(describe_checkpoint, directory))
            if lacking := _without_header(checkpoint, start, last):
                raise NobodyHas(f"no node that can be reached has {min(lacking)} of {name}")
        files = await _in_thread(partial(KeptFiles, directory))
        await self._fill(name, files, checkpoint.tensors_for(start, last), progress)
        return directory

    async def _fill(
        self, name: str, files: KeptFiles, tensors: frozenset[str], progress: Progress
    ) -> None:
        damaged = await _in_thread(files.recover)
        if damaged:
            log.warning("%d chunks of %s were damaged and come again", damaged, name)
        wanted = await _in_thread(partial(files.missing, tensors))
        if wanted:
            size = sum(chunk.size for chunk in wanted)
            total = await _in_thread(partial(files.size_of, tensors))
            await _in_thread(partial(kept.check_room, files.directory, size))
            await _in_thread(files.begin)
            log.info("fetching %.1f MiB of %s from other nodes", size / (1 << 20), name)
            run = Run(self, name, self._store.label(files.directory), files, total, progress)
            await run.fetch(wanted)
            log.info("fetched %d bytes of %s; %d came", size, name, run.came)
        await _in_thread(files.finish)
        progress(1.0)

    @property
    def busy(self) -> bool:
        return self._busy()

    @property
    def network(self) -> Network:
        return self._network


def _without_header(checkpoint: Checkpoint, start: int, end: int) -> frozenset[str]:
    """Files of which nothing is here, but some tensor needed."""
    files = {checkpoint.shards[tensor] for tensor in checkpoint.tensors_for(start, end)}
    return frozenset(files & set(checkpoint.missing))


async def _in_thread(call: Callable[[], ResultT]) -> ResultT:
    # To its end: what another one writes meanwhile would be mixed with what this one does.
    return await trio.to_thread.run_sync(call)


@contextmanager
def _disk_errors(name: str) -> Iterator[None]:
    """Raises `ModelError` for what the disk does not do."""
    try:
        yield
    except OSError as error:
        raise kept.disk_error(name, error) from error


def _small(which: Which, offset: int, size: int, number: int) -> ReadSmall:
    return ReadSmall(number, which, offset, size)


def _has(path: Path, file: MetadataFile) -> bool:
    if not path.is_file() or path.stat().st_size != file.size:
        return False
    return digest_of(path.read_bytes()) == file.digest


def _is_sound(directory: Path) -> bool:
    """Whether what came before can be built upon; single files are compared when they are not."""
    try:
        describe_checkpoint(directory)
    except ModelError as error:
        log.warning("what is here of a model is damaged, and comes again: %s", error)
        return False
    return True
