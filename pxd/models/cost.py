"""What the model in a directory costs, as exactly as its files tell."""

from pathlib import Path

import msgspec

from pxd.models.config import read_json
from pxd.models.describe import INDEX_NAME, describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.safetensors import read_header
from pxd.planning.cost.config import cost_from_config
from pxd.planning.model import Experts, ModelCost


def read_cost(directory: Path) -> ModelCost:
    """The cost of the model in `directory`. Raises `ModelError`.

    With all weight files there, sizes are those of their tensors; with an index alone, formulas
    scaled to its total; with nothing but config.json, formulas.
    """
    path = directory / "config.json"
    config = read_json(path)
    try:
        cost = cost_from_config(config)
        if not _has_layout(directory):
            return cost
        checkpoint = describe_checkpoint(directory)
        if checkpoint.exact:
            files = sorted(set(checkpoint.shards.values()))
            return cost_from_config(config, _tensors(directory, files))
    except ValueError as error:
        raise ModelError(f"{path}: {error}") from error
    both_ends = checkpoint.embedding_bytes + checkpoint.head_bytes * (not checkpoint.tied)
    total = sum(checkpoint.layer_bytes) + both_ends
    return _scaled(msgspec.structs.replace(cost, tied=checkpoint.tied), total)


def _has_layout(directory: Path) -> bool:
    return (directory / INDEX_NAME).is_file() or any(directory.glob("model*.safetensors"))


def _tensors(directory: Path, files: list[str]) -> dict[str, int]:
    headers = (read_header(directory / file) for file in files)
    return {name: tensor.nbytes for header in headers for name, tensor in header.items()}


def _scaled(cost: ModelCost, total: int) -> ModelCost:
    """The same model with all sizes in proportion, so that it has `total` bytes."""
    factor = total / cost.total_bytes
    return msgspec.structs.replace(
        cost,
        layer_bytes=tuple(round(size * factor) for size in cost.layer_bytes),
        embedding_bytes=round(cost.embedding_bytes * factor),
        head_bytes=round(cost.head_bytes * factor),
        experts=tuple(
            one and Experts(one.total, one.active, round(one.bytes_each * factor))
            for one in cost.experts
        ),
    )
