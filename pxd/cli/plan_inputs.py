"""What `pxd plan` plans for: a model, and a cluster from a file or from a daemon."""

from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from pxd.cli.client import Client
from pxd.cli.find import find_daemon
from pxd.planning.cluster_file import MAX_BYTES, Cluster, decode_json, parse_cluster
from pxd.planning.model import ModelCost, PlanSettings
from pxd.planning.result import PlanInputs
from pxd.serving.basis import PLAN_SETTINGS
from pxd.serving.view import Planning


class BadInput(Exception):
    """Something the person gave cannot be used; the message says what and where."""


class Shares(msgspec.Struct, frozen=True):
    """What parts of the memory may be used; None: as usual."""

    weights: float | None
    kv: float | None


class Question(msgspec.Struct, frozen=True):
    """`names` are those that people know the nodes by, `machines` say what the nodes are.

    `order` is empty, or the nodes that must form one pipeline.
    """

    model: str
    inputs: PlanInputs
    names: Mapping[str, str]
    machines: Mapping[str, str] = {}
    order: tuple[str, ...] = ()


def ask_file(path: Path, model: str | None, shares: Shares) -> Question:
    """Raises `BadInput`."""
    if model is None:
        raise BadInput("--cluster needs a model to plan for: name it with --model")
    cluster = _cluster(path)
    inputs = PlanInputs(
        model=_model(model, all_mlx=cluster.all_mlx),
        offers=cluster.offers,
        settings=_settings(PLAN_SETTINGS, shares),
        links=cluster.links,
    )
    names = {offer.id: offer.id for offer in cluster.offers}
    return Question(model, inputs, names, cluster.machines, cluster.order)


def ask_daemon(
    node: str | None, data_dir: Path | None, model: str | None, shares: Shares
) -> Question:
    """Raises `BadInput`, and `NoDaemon`, `Unreachable` or `Refused` where no daemon answers."""
    live = Client(find_daemon(node, data_dir).url).get("/cluster/planning", Planning)
    inputs = msgspec.structs.replace(live.inputs, settings=_settings(live.inputs.settings, shares))
    if model is not None:
        inputs = msgspec.structs.replace(inputs, model=_model(model, all_mlx=False))
        # What a node was measured at is a matter of the model that it ran.
        offers = [msgspec.structs.replace(offer, measured=None) for offer in inputs.offers]
        inputs = msgspec.structs.replace(inputs, offers=tuple(offers))
    return Question(live.model if model is None else model, inputs, _unique(live.names))


def _unique(names: Mapping[str, str]) -> dict[str, str]:
    """Names as they are, and with the end of the id where two nodes have the same."""
    count = Counter(names.values())
    return {
        node: name if count[name] == 1 else f"{name}~{node[-5:]}" for node, name in names.items()
    }


def _settings(usual: PlanSettings, shares: Shares) -> PlanSettings:
    for option, share in (("--param-ratio", shares.weights), ("--kv-ratio", shares.kv)):
        if share is not None and not 0 < share <= 1:
            raise BadInput(f"{option} must be above 0 and at most 1, not {share:g}")
    weights = usual.weight_share if shares.weights is None else shares.weights
    kv = usual.kv_share if shares.kv is None else shares.kv
    if weights + kv > 1:
        raise BadInput(
            f"--param-ratio {weights:g} and --kv-ratio {kv:g} are more than the memory together"
        )
    return PlanSettings(weight_share=weights, kv_share=kv, min_kv_tokens=usual.min_kv_tokens)


def _cluster(path: Path) -> Cluster:
    try:
        return parse_cluster(_read(path))
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from error


def _model(name: str, *, all_mlx: bool) -> ModelCost:
    path = Path(name)
    try:
        cost = _file_cost(path, all_mlx) if path.suffix == ".json" else _catalog_cost(name)
    except ValueError as error:
        raise BadInput(f"{name}: {error}") from error
    if not cost.layers:
        raise BadInput(f"{name}: the model has no layers")
    return cost


def _catalog_cost(name: str) -> ModelCost:
    from pxd.models.catalog import fetch_metadata
    from pxd.models.cost import read_cost
    from pxd.models.errors import ModelError

    try:
        return read_cost(fetch_metadata(name))
    except ModelError as error:
        raise BadInput(str(error)) from error


def _file_cost(path: Path, all_mlx: bool) -> ModelCost:
    """Of a configuration in Hugging Face's format, or of plain cost fields."""
    from pxd.planning.cost.config import cost_from_config
    from pxd.planning.cost.reference import read_cost_fields, to_model_cost

    content = decode_json(_read(path), dict[str, Any])
    if "model_type" in content:
        return cost_from_config(content)
    return to_model_cost(read_cost_fields(content), mlx=all_mlx)


def _read(path: Path) -> bytes:
    """Never more than a little over the limit, whatever the path leads to."""
    try:
        with path.expanduser().open("rb") as file:
            raw = file.read(MAX_BYTES + 1)
    except (OSError, RuntimeError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise BadInput(f"cannot read {path}: {reason}") from error
    if len(raw) > MAX_BYTES:
        raise BadInput(f"{path} has more than {MAX_BYTES >> 20} MiB")
    return raw
