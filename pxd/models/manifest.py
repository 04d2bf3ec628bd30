"""What a node tells others of a model's files that it has: enough to fetch any part of them."""

from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Annotated

import msgspec

from pxd.models.chunks import DIGEST_BYTES, Chunk, Grid, digest_of
from pxd.models.errors import ModelError
from pxd.models.safetensors import MAX_HEADER_BYTES
from pxd.wire import Count

METADATA = ("*.json", "*.jinja", "*.txt", "*.model", "*.tiktoken")
"""Configuration and tokenizers, which come in all of these. No *.py: a model's own code is never
run."""

MAX_METADATA_BYTES = 256 << 20
"""Of all those files and all headers together."""

MAX_MODEL_BYTES = 8 << 40
MAX_FILES = 4096
MAX_RUNS = 65536
MAX_CHANGED = (1 << 62) - 1

Digest = Annotated[bytes, msgspec.Meta(min_length=DIGEST_BYTES, max_length=DIGEST_BYTES)]
FileName = Annotated[str, msgspec.Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\Z")]
MetadataName = Annotated[
    str,
    msgspec.Meta(pattern=r"\A[A-Za-z0-9_][A-Za-z0-9_.-]{0,200}\.(json|jinja|txt|model|tiktoken)\Z"),
]
WeightsName = Annotated[str, msgspec.Meta(pattern=r"\Amodel[A-Za-z0-9_.-]{0,200}\.safetensors\Z")]
Fingerprint = Annotated[str, msgspec.Meta(max_length=128)]
Run = tuple[Count, Annotated[int, msgspec.Meta(ge=1, lt=1 << 48)]]


class MetadataFile(msgspec.Struct, frozen=True, array_like=True):
    """A small file, fetched whole."""

    name: MetadataName
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_METADATA_BYTES)]
    digest: Digest


class WeightsFile(msgspec.Struct, frozen=True, array_like=True):
    """A safetensors file of `size` bytes. Its first `head` bytes, up to the first tensor, have
    `digest`; `held` are the chunks that are there, in runs of (first, count). `changed` is when it
    was last changed, in nanoseconds of the source's clock."""

    name: WeightsName
    size: Annotated[int, msgspec.Meta(ge=0, le=MAX_MODEL_BYTES)]
    head: Annotated[int, msgspec.Meta(ge=8, le=MAX_HEADER_BYTES + 8)]
    digest: Digest
    held: Annotated[tuple[Run, ...], msgspec.Meta(max_length=MAX_RUNS)]
    changed: Annotated[int, msgspec.Meta(ge=0, le=MAX_CHANGED)] = 0


class Manifest(msgspec.Struct, frozen=True, kw_only=True):
    """`fingerprint` is the one that plans go by, of configuration and layout; `mark` tells
    tokenizers apart, too. Two nodes with both equal have the same files, if none is damaged.
    `revision` is the commit that the hub calls it by, where it comes from there."""

    fingerprint: Fingerprint
    mark: Fingerprint
    revision: Fingerprint = ""
    files: Annotated[tuple[MetadataFile, ...], msgspec.Meta(max_length=MAX_FILES)]
    weights: Annotated[tuple[WeightsFile, ...], msgspec.Meta(max_length=MAX_FILES)]

    @property
    def identity(self) -> tuple[str, str]:
        return self.fingerprint, self.mark

    def flaw(self) -> str:
        """What is wrong with it beyond its types; empty if nothing is."""
        names = [file.name for file in self.files] + [file.name for file in self.weights]
        small = sum(file.size for file in self.files) + sum(file.head for file in self.weights)
        if len({name.lower() for name in names}) < len(names):
            return "it names a file twice"
        if "config.json" not in names:
            return "it has no config.json"
        if small > MAX_METADATA_BYTES or sum(f.size for f in self.weights) > MAX_MODEL_BYTES:
            return "it is too large"
        if any(file.head > file.size for file in self.weights):
            return "a header is longer than its file"
        return ""


class Held:
    """Which chunks of which files a source has."""

    def __init__(self, weights: Iterable[WeightsFile]) -> None:
        files = tuple(weights)
        self._runs = {file.name: sorted(file.held) for file in files}
        self.changed = {file.name: file.changed for file in files}

    def __call__(self, chunk: Chunk) -> bool:
        runs = self._runs.get(chunk.file, [])
        place = bisect_right(runs, (chunk.number, 1 << 48)) - 1
        return place >= 0 and chunk.number < sum(runs[place])


def one_revision(manifests: Mapping[str, Manifest], fingerprint: str = "") -> dict[str, Manifest]:
    """Those sources that have the same files: of `fingerprint` where it is given, else what most of
    them have; where that is a draw, what the first of them has."""
    groups: dict[tuple[str, str], dict[str, Manifest]] = {}
    for source, manifest in manifests.items():
        if fingerprint in ("", manifest.fingerprint):
            groups.setdefault(manifest.identity, {})[source] = manifest
    return max(groups.values(), key=len, default={})


def layout(manifests: Iterable[Manifest]) -> list[WeightsFile]:
    """The weights files of one revision, as most of its sources have them."""
    seen: dict[str, Counter[tuple[int, int, bytes]]] = {}
    for manifest in manifests:
        for file in manifest.weights:
            key = file.size, file.head, file.digest
            seen.setdefault(file.name, Counter())[key] += 1
    return [
        WeightsFile(name, *counts.most_common(1)[0][0], held=())
        for name, counts in sorted(seen.items())
    ]


def metadata_files(directory: Path) -> Iterator[Path]:
    names = {path.name for pattern in METADATA for path in directory.glob(pattern)}
    return (directory / name for name in sorted(names) if (directory / name).is_file())


def describe_metadata(directory: Path) -> tuple[MetadataFile, ...]:
    """Raises `ModelError` where there is too much of it."""
    found, total = [], 0
    for path in metadata_files(directory):
        size = path.stat().st_size
        total += size
        if total > MAX_METADATA_BYTES:
            raise ModelError(f"{directory} has over {MAX_METADATA_BYTES >> 20} MiB of small files")
        try:
            name = msgspec.convert(path.name, MetadataName)
        except msgspec.ValidationError:
            continue  # no model's own file is called like that
        data = path.read_bytes()
        found.append(MetadataFile(name, len(data), digest_of(data)))
    return tuple(found)


def describe_weights(path: Path, grid: Grid, held: list[bool]) -> WeightsFile:
    with path.open("rb") as file:
        head = file.read(grid.head_bytes)
    runs, stat = tuple(runs_of(held)), path.stat()
    changed = min(max(0, stat.st_mtime_ns), MAX_CHANGED)
    return WeightsFile(path.name, stat.st_size, len(head), digest_of(head), runs, changed)


def runs_of(held: list[bool]) -> Iterator[Run]:
    first = None
    for index, here in enumerate((*held, False)):
        if here and first is None:
            first = index
        elif not here and first is not None:
            yield first, index - first
            first = None
