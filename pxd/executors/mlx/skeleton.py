"""Models as mlx-lm builds them from a configuration, before any weight is read."""

from pathlib import Path
from typing import Any

import mlx.nn as nn
from mlx_lm.utils import _get_classes, load_config

from pxd.executors.protocol import ExecutorError


def model_classes(config: dict[str, Any]) -> tuple[Any, Any]:
    """mlx-lm's classes of model and arguments. Raises `ExecutorError` where it has none."""
    try:
        return _get_classes(config)
    except (ValueError, KeyError, AttributeError, SystemExit) as error:
        # SystemExit: one module ends the process when a package it wants is not installed.
        raise ExecutorError(
            f"mlx-lm cannot run {config.get('model_type')} models: {error}"
        ) from error


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
