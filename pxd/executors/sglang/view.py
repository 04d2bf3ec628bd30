"""A directory that shows SGLang one stage of a model as if it were all there is.

SGLang loads from a directory, and refuses an index that names absent files. So each stage is given
a directory of its own with links to the files that it needs, an index of only those, and a
configuration that fits. Nothing of SGLang's loaders is changed.
"""

import json
from pathlib import Path
from typing import Any

from pxd.executors.protocol import ExecutorError
from pxd.models.config import read_json
from pxd.models.describe import INDEX_NAME, Checkpoint
from pxd.models.errors import ModelError
from pxd.models.safetensors import read_header
from pxd.planning.cost.tensors import IGNORED

TIED_HEAD = "model-tied-head.safetensors"
_COPIED_AT_ONCE = 16 << 20
_EMBEDDING = "embed_tokens.weight"
_LENGTH_BYTES = 8


def make_view(
    source: Path,
    target: Path,
    checkpoint: Checkpoint,
    start: int,
    end: int,
    architecture: str,
) -> None:
    """Make a view of layers [start, end) of the model in `source` in the empty directory `target`.

    A last stage that is not the first gets a copy of a tied embedding under the head's name: it has
    no embedding to share. Raises `ExecutorError`, and `OSError` where there is no room for that.
    """
    whole = start == 0 and end == checkpoint.layers
    index = {
        tensor: file
        for tensor, file in checkpoint.shards.items()
        if _is_needed(checkpoint, tensor, start, end)
    }
    absent = sorted(set(index.values()) & set(checkpoint.missing))
    if absent:
        files = ", ".join(absent)
        raise ExecutorError(f"{source} lacks {files}, needed for layers [{start}, {end})")
    for file in sorted(set(index.values())):
        (target / file).symlink_to((source / file).resolve())
    if checkpoint.tied and end == checkpoint.layers and not whole:
        _copy_head(source, target, index)
        index["lm_head.weight"] = TIED_HEAD
    (target / INDEX_NAME).write_text(json.dumps({"metadata": {}, "weight_map": index}))
    config = view_config(source, architecture)
    if not whole:
        config["tie_word_embeddings"] = False
        if isinstance(config.get("text_config"), dict):
            config["text_config"]["tie_word_embeddings"] = False
    (target / "config.json").write_text(json.dumps(config))


def view_config(source: Path, architecture: str) -> dict[str, Any]:
    """The model's configuration with its architecture named. Raises `ExecutorError`."""
    try:
        config = read_json(source / "config.json")
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    if isinstance(config.get("quantization"), dict):
        raise ExecutorError("it is quantised in MLX's own way, which only the mlx executor reads")
    return {**config, "architectures": [architecture]}


def _is_needed(checkpoint: Checkpoint, tensor: str, start: int, end: int) -> bool:
    layer = checkpoint.layer_of(tensor)
    if layer is not None:
        return start <= layer < end
    ends = start == 0 or end == checkpoint.layers
    return ends and not IGNORED.search(tensor)


def _copy_head(source: Path, target: Path, index: dict[str, str]) -> None:
    """Write the embedding into a file of its own, as the projection. Raises `OSError`."""
    name = next((tensor for tensor in index if tensor.endswith(_EMBEDDING)), None)
    if name is None:
        raise ExecutorError("the checkpoint lacks lm_head.weight and model.embed_tokens.weight")
    path = source / index[name]
    try:
        info = read_header(path)[name]
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    entry = {"dtype": info.dtype, "shape": info.shape, "data_offsets": (0, info.nbytes)}
    header = json.dumps({"lm_head.weight": entry}).encode()
    with path.open("rb") as read, (target / TIED_HEAD).open("wb") as written:
        length = int.from_bytes(read.read(_LENGTH_BYTES), "little")
        read.seek(_LENGTH_BYTES + length + info.data_offsets[0])
        written.write(len(header).to_bytes(_LENGTH_BYTES, "little") + header)
        left = info.nbytes
        while left:
            piece = read.read(min(left, _COPIED_AT_ONCE))
            if not piece:
                raise ExecutorError(f"{path} ends within {name}; fetch it again")
            written.write(piece)
            left -= len(piece)
