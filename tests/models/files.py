"""Writes small model directories by hand, without any tensor library."""

import json
import math
import os
import random
from pathlib import Path
from typing import Any

from pxd.models.files import ModelFiles
from pxd.models.kept import KeptFiles, put_head, put_small
from pxd.models.library import Library

CONFIG: dict[str, Any] = {
    "model_type": "llama",
    "num_hidden_layers": 3,
    "hidden_size": 8,
    "vocab_size": 10,
    "max_position_embeddings": 128,
    "torch_dtype": "bfloat16",
    "eos_token_id": 2,
}
BYTES = {"BF16": 2, "F32": 4, "U32": 4}
LAYER_KIB = 600

Shapes = dict[str, tuple[str, tuple[int, ...]]]


def write_safetensors(path: Path, tensors: Shapes) -> Path:
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    position = 0
    for name, (dtype, shape) in tensors.items():
        size = math.prod(shape) * BYTES[dtype]
        header[name] = {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [position, position + size],
        }
        position += size
    return write_raw(path, json.dumps(header).encode(), bytes(position))


def write_raw(path: Path, header: bytes, data: bytes = b"") -> Path:
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)
    return path


def layer_shapes(layers: int = 3, prefix: str = "model.layers.") -> Shapes:
    """Layers of 128, 256, 384 … bytes."""
    return {f"{prefix}{i}.mlp.weight": ("BF16", (8, 8 * (i + 1))) for i in range(layers)}


def model_shapes(*, tied: bool = False, layers: int = 3) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": ("BF16", (10, 8)), **layer_shapes(layers)}
    shapes["model.norm.weight"] = ("BF16", (8,))
    if not tied:
        shapes["lm_head.weight"] = ("BF16", (10, 8))
    return shapes


def write_model(
    directory: Path, shapes: Shapes | None = None, config: dict[str, Any] | None = None
) -> Path:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps({**CONFIG, **(config or {})}))
    write_safetensors(directory / "model.safetensors", shapes or model_shapes())
    return directory


def write_sharded(directory: Path, shapes: Shapes, *, shards: int = 3) -> Path:
    """Tensors spread in order over `shards` files with an index."""
    directory.mkdir(parents=True, exist_ok=True)
    (directory / "config.json").write_text(json.dumps(CONFIG))
    names = list(shapes)
    size = -(-len(names) // shards)
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05}-of-{shards:05}.safetensors"
        part = {name: shapes[name] for name in names[i * size : (i + 1) * size]}
        write_safetensors(directory / file, part)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(math.prod(shape) * BYTES[dtype] for dtype, shape in shapes.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index))
    return directory


def write_random(directory: Path, *, shards: int = 2, layers: int = 4, seed: int = 0) -> Path:
    """Layers of `LAYER_KIB` and random bytes in all of them: large enough to be cut into chunks."""
    shapes = model_shapes(layers=0)
    for layer in range(layers):
        shapes[f"model.layers.{layer}.mlp.weight"] = ("BF16", (LAYER_KIB, 512))
        shapes[f"model.layers.{layer}.norm.weight"] = ("BF16", (8,))
    write_sharded(directory, shapes, shards=shards)
    (directory / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": layers}))
    (directory / "tokenizer.json").write_text('{"version": "1.0"}')
    rng = random.Random(seed)
    for path in sorted(directory.glob("*.safetensors")):
        data = path.read_bytes()
        head = 8 + int.from_bytes(data[:8], "little")
        path.write_bytes(data[:head] + rng.randbytes(len(data) - head))
    return directory


def flip(path: Path, place: int, *, secretly: bool = False) -> None:
    """Change one byte of a file; `secretly` as a disk does, without a new time of change."""
    stat = path.stat()
    with path.open("r+b") as file:
        file.seek(place)
        [byte] = file.read(1)
        file.seek(place)
        file.write(bytes([byte ^ 1]))
    if secretly:
        os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


def keep_part(name: str, source: Path, root: Path, tensors: frozenset[str]) -> Path:
    """A directory as one is after `tensors` of `source` have come from another node; `root` is that
    of a `Library`."""
    library = Library(root)
    files = ModelFiles(source, library.digests)
    store, manifest = library.store, files.manifest
    directory = store.place(name, manifest)
    directory.mkdir(parents=True, exist_ok=True)
    for small in manifest.files:
        put_small(directory, small.name, (source / small.name).read_bytes())
    for file in manifest.weights:
        put_head(directory, file, files.read_small(file.name, 0, file.head))
    store.finish(directory, name, manifest)
    kept = KeptFiles(directory)
    kept.begin()
    for chunk in kept.missing(tensors):
        [digest] = files.digests(chunk.file, [chunk])
        kept.put(chunk.file, [(chunk, memoryview(files.read(chunk.file, [chunk])), digest)])
    kept.finish()
    return directory
