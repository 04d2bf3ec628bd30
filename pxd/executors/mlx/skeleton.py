"""Models as mlx-lm builds them from a configuration, before any weight is read."""

import dataclasses
from importlib.metadata import version
from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_config

from pxd.executors.protocol import ExecutorError


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes of model and arguments.

    Raises `ExecutorError` where it has none or the configuration lacks what they need.
    """
    kind = config.get("model_type")
    try:
        model, arguments = _get_classes(config)
    except (ValueError, KeyError, AttributeError) as error:
        raise ExecutorError(
            f"this pxd cannot run {kind} models, for mlx-lm {version('mlx-lm')} has no code for "
            "them; a newer release may, else choose another model"
        ) from error
    except SystemExit as error:
        # One module ends the process when a package it wants is not installed.
        raise ExecutorError(
            f"mlx-lm cannot run {kind} models here: its code wants a package that is not installed"
        ) from error
    absent = [name for name in _required(arguments) if name not in config]
    if absent:
        raise ExecutorError(
            f"config.json lacks {', '.join(absent)}, which {kind} models need; "
            "take it from where the model comes from"
        )
    return model, arguments


def _required(arguments: Any) -> list[str]:
    """What a configuration must say, as far as the class of arguments reads it as it is."""
    own_way = "from_dict" in vars(arguments)
    if own_way or not dataclasses.is_dataclass(arguments):
        return []
    fields = dataclasses.fields(arguments)
    return [f.name for f in fields if f.default is f.default_factory is dataclasses.MISSING]


def make_skeleton(path: Path) -> nn.Module:
    """The model in `path`; nothing of it is evaluated. Raises `ExecutorError`."""
    config = load_config(path)
    if config.get("model_file") is not None:
        raise ExecutorError(f"{path} wants its own code to be run, which pxd never does")
    model_class, args_class = model_classes(config)
    try:
        return model_class(args_class.from_dict(config))
    except (ValueError, TypeError, KeyError, AttributeError, NotImplementedError) as error:
        raise ExecutorError(
            f"mlx-lm cannot build the {config.get('model_type')} model in {path}: {error}"
        ) from error
