"""Tells revisions of a model apart without reading its weights, of which a node may hold a part."""

import hashlib
from pathlib import Path

from pxd.models.describe import INDEX_NAME
from pxd.models.errors import ModelError

HEX_DIGITS = 32
LARGEST = 256 << 20
"""A file of metadata beyond this is left out."""

HEADER_LIMIT = 64 << 20
_NAMES = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json")


def fingerprint(directory: Path) -> str:
    """SHA-256, shortened, over configuration, tokenizer and the layout of the weights. Blocks.
    Raises `ModelError`."""
    digest = hashlib.sha256()
    try:
        for file in (*_NAMES, INDEX_NAME):
            path = directory / file
            if path.is_file() and path.stat().st_size <= LARGEST:
                _add(digest, file, path.read_bytes())
        if not (directory / INDEX_NAME).is_file():
            # One file holds all weights; its header says where and in which type.
            for path in sorted(directory.glob("model*.safetensors")):
                _add(digest, path.name, _header(path))
    except OSError as error:
        raise ModelError(f"{directory} cannot be read: {error}") from error
    return digest.hexdigest()[:HEX_DIGITS]


def _add(digest: "hashlib._Hash", name: str, data: bytes) -> None:
    for part in (name.encode(), data):
        digest.update(len(part).to_bytes(8, "big") + part)


def _header(path: Path) -> bytes:
    with path.open("rb") as file:
        size = file.read(8)
        return size + file.read(min(int.from_bytes(size, "little"), HEADER_LIMIT))
