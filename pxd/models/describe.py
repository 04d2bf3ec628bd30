"""What a model directory holds, read from its configuration and safetensors headers alone.

Works on a directory that has only config.json and the index yet, then with estimated byte counts.
"""

import hashlib
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

import msgspec

from pxd.models.chunks import Grid
from pxd.models.config import ModelConfig, read_json
from pxd.models.errors import ModelError
from pxd.models.journal import SIDE_DIRECTORY, Journal, journal_path
from pxd.models.safetensors import TensorInfo, read_header
from pxd.planning.cost.tensors import (
    EMBEDDING,
    HEAD,
    IGNORED,
    TensorSizes,
    find_layers,
    layer_number,
    sort_tensors,
)

INDEX_NAME = "model.safetensors.index.json"
MAX_INDEX_BYTES = 256 << 20

_SHARD_NAME = re.compile(r"model[\w.-]{0,200}\.safetensors")
# Where they came from does not change what they are.
_CONFIG_NOISE = frozenset({"_name_or_path", "transformers_version", "_commit_hash"})


class Checkpoint(msgspec.Struct, frozen=True, kw_only=True):
    """A model's files. `shards` maps each tensor to its file name, where the directory says so.

    `layer_prefix` is what stands before the layer number in the names of decoder layers' tensors;
    None where the names do not number all layers, so that their bytes are only known together.
    `exact` tells whether byte counts come from headers. `missing` are files not fetched yet, and
    `absent` are tensors of other files whose bytes are not here. Sizes are None where the
    configuration leaves them to the model's code.
    """

    architecture: str
    layers: int
    hidden_size: int | None
    vocabulary: int | None
    context: int | None
    layer_bytes: tuple[int, ...]
    embedding_bytes: int
    head_bytes: int
    tied: bool
    may_tie: bool
    eos: tuple[int, ...]
    dtype: str
    fingerprint: str
    layer_prefix: str | None
    shards: dict[str, str]
    exact: bool
    missing: tuple[str, ...]
    absent: frozenset[str] = frozenset()

    def layer_of(self, tensor: str) -> int | None:
        """The decoder layer that a tensor belongs to; None for everything outside the layers."""
        number = layer_number(tensor, self.layer_prefix)
        return number if number is not None and number < self.layers else None

    def files_for(self, start: int, end: int) -> tuple[str, ...]:
        """Names of the files that a stage of layers [start, end) needs.

        The ends of a model are not told apart: the first and the last stage get both.
        """
        ends = start == 0 or end == self.layers
        wanted = set()
        for tensor, file in self.shards.items():
            layer = self.layer_of(tensor)
            if layer is None:
                if ends and not IGNORED.search(tensor):
                    wanted.add(file)
            elif start <= layer < end:
                wanted.add(file)
        return tuple(sorted(wanted))

    def tensors_for(self, start: int, end: int) -> frozenset[str]:
        """Names of the tensors that a stage of layers [start, end) needs.

        Of what is outside of the layers, only embedding and head are told apart; the rest is small.
        """
        first, last = start == 0, end == self.layers
        wanted = set()
        for tensor in self.shards:
            number = layer_number(tensor, self.layer_prefix)
            if number is not None:
                # Those behind the last layer are for drafting, and not loaded.
                needed = start <= number < end
            elif EMBEDDING.search(tensor):
                needed = first or (last and self.may_tie)
            elif HEAD.search(tensor):
                needed = last
            else:
                needed = True
            if needed and (number is not None or not IGNORED.search(tensor)):
                wanted.add(tensor)
        return frozenset(wanted)


def describe_checkpoint(directory: Path) -> Checkpoint:
    """Describe the model in `directory`. Raises `ModelError`."""
    if not directory.is_dir():
        raise ModelError(f"there is no directory {directory}")
    config = ModelConfig.read(directory)
    index = _read_index(directory)
    files = sorted(set(index.weight_map.values())) if index else _single_files(directory)
    missing = tuple(name for name in files if not (directory / name).is_file())
    headers = {name: read_header(directory / name) for name in files if name not in missing}
    tensors = {tensor: info for header in headers.values() for tensor, info in header.items()}
    shards = index.weight_map if index else _shards(headers)
    if index:
        _check_index(directory, index, headers)
    prefix, layers = find_layers(shards, config.layers)
    if layers is None:
        raise ModelError("neither config.json nor the tensors' names tell the layers")
    tied = not any(HEAD.search(name) for name in _outside(shards, prefix))
    sizes = (
        sort_tensors({name: info.nbytes for name, info in tensors.items()}, layers)
        if not missing
        else _estimated_sizes(config, index, layers, tied)
    )
    return Checkpoint(
        architecture=config.architecture,
        layers=layers,
        hidden_size=config.hidden_size,
        vocabulary=config.vocabulary,
        context=config.context,
        layer_bytes=sizes.layers,
        embedding_bytes=sizes.embedding,
        head_bytes=sizes.head,
        tied=tied,
        may_tie=tied or config.may_tie,
        eos=config.eos,
        dtype=config.dtype,
        fingerprint=_fingerprint(config, index, tensors),
        layer_prefix=prefix,
        shards=shards,
        exact=not missing,
        missing=missing,
        absent=frozenset(
            tensor for file in headers for tensor in _absent(directory, file, headers[file])
        ),
    )


def _absent(directory: Path, file: str, header: Mapping[str, TensorInfo]) -> Iterator[str]:
    """Tensors with holes, in a directory that is filled from other nodes."""
    if not (directory / SIDE_DIRECTORY).is_dir():
        return iter(())
    try:
        grid = Grid(file, header, (directory / file).stat().st_size)
        return grid.lacking(Journal(journal_path(directory, file), grid.count).held())
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error


class _Index(msgspec.Struct):
    weight_map: dict[str, str]
    metadata: dict[str, Any] = {}

    @property
    def total_size(self) -> int | None:
        value = self.metadata.get("total_size")
        # Some files say it as a float.
        return int(value) if isinstance(value, int | float) and 0 < value < 1e18 else None


def _read_index(directory: Path) -> _Index | None:
    path = directory / INDEX_NAME
    if not path.is_file():
        return None
    try:
        index = msgspec.convert(read_json(path, MAX_INDEX_BYTES), _Index)
    except msgspec.ValidationError as error:
        raise ModelError(f"{path} is damaged: {error}") from error
    for name in set(index.weight_map.values()):
        # Also keeps a hostile index from naming files outside the directory.
        if not _SHARD_NAME.fullmatch(name):
            raise ModelError(f"{path} names {name!r}, which is no model*.safetensors file")
    if not index.weight_map:
        raise ModelError(f"{path} names no tensors")
    return index


def _single_files(directory: Path) -> list[str]:
    files = sorted(path.name for path in directory.glob("model*.safetensors") if path.is_file())
    if files:
        return files
    if any(directory.glob("*.bin")) or any(directory.glob("*.pt")):
        raise ModelError(
            f"{directory} has its weights as pickle files, which can run code when loaded; "
            "convert them to safetensors first"
        )
    raise ModelError(f"{directory} has no model*.safetensors and no {INDEX_NAME}")


def _shards(headers: Mapping[str, Mapping[str, TensorInfo]]) -> dict[str, str]:
    return {tensor: file for file, header in headers.items() for tensor in header}


def _check_index(
    directory: Path, index: _Index, headers: Mapping[str, Mapping[str, TensorInfo]]
) -> None:
    for tensor, file in index.weight_map.items():
        if file in headers and tensor not in headers[file]:
            raise ModelError(
                f"{directory / file} lacks {tensor}, which the index promises; fetch it again"
            )


def _outside(tensors: Iterable[str], prefix: str | None) -> list[str]:
    return [
        name for name in tensors if layer_number(name, prefix) is None and not IGNORED.search(name)
    ]


def _estimated_sizes(
    config: ModelConfig, index: _Index | None, layers: int, tied: bool
) -> TensorSizes:
    total = index.total_size if index else None
    if total is None:
        raise ModelError(f"{INDEX_NAME} has no total_size; fetch the whole model first")
    elements = (config.vocabulary or 0) * (config.hidden_size or 0)
    matrix = min(int(elements * config.element_bytes), total // 3)
    inside = total - matrix * (1 if tied else 2)
    layer_bytes = (-(-inside // layers),) * layers
    return TensorSizes(layer_bytes, (0,) * layers, matrix, matrix, tied)


def _fingerprint(
    config: ModelConfig, index: _Index | None, tensors: Mapping[str, TensorInfo]
) -> str:
    """Digest of the configuration and the layout of the tensors.

    With an index, its map stands for the layout: nodes that hold different shards agree on it.
    """
    known = {key: value for key, value in config.raw.items() if key not in _CONFIG_NOISE}
    layout = (
        (sorted(index.weight_map.items()), index.total_size)
        if index
        else sorted((name, msgspec.to_builtins(tensor)) for name, tensor in tensors.items())
    )
    content = msgspec.json.encode((known, layout), order="deterministic")
    return hashlib.sha256(content).hexdigest()
