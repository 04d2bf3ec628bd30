"""Models as transformers builds them from a configuration, before any weight is read."""

from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils import logging as transformers_logging

from pxd.executors.protocol import ExecutorError
from pxd.executors.torch.attention import NAME
from pxd.models.config import read_json
from pxd.models.errors import ModelError

# What goes to stderr is the daemon's log.
transformers_logging.disable_progress_bar()
transformers_logging.set_verbosity_error()

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


def read_config(path: Path) -> Any:
    """transformers' configuration of the model in `path`. Raises `ExecutorError`."""
    try:
        raw = read_json(path / "config.json")
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    try:
        # No code of the model's own is ever run.
        return AutoConfig.from_pretrained(path, trust_remote_code=False, local_files_only=True)
    except (ValueError, KeyError, TypeError, AttributeError, OSError, RecursionError) as error:
        kind = raw.get("model_type")
        raise ExecutorError(f"transformers cannot run {kind} models: {_short(error)}") from error


def model_class(config: Any) -> type[nn.Module]:
    """Raises `ExecutorError` where there is no language model of this kind, or one whose layers
    attend in ways that this executor does not know."""
    text = config.get_text_config()
    unknown = sorted({*(getattr(text, "layer_types", None) or ())} - _KNOWN_LAYERS)
    if unknown:
        raise ExecutorError(
            f"{config.model_type} has layers of type {unknown[0]}, "
            "which the torch executor does not run"
        )
    mapping = AutoModelForCausalLM._model_mapping
    if type(config) not in mapping:
        raise ExecutorError(f"transformers has no language model for {config.model_type}")
    found: type[nn.Module] = mapping[type(config)]
    if not getattr(found, "_supports_attention_backend", False):
        raise ExecutorError(f"transformers' {config.model_type} cannot attend by other code")
    return found


def make_skeleton(config: Any) -> nn.Module:
    """The model without memory for its weights. Raises `ExecutorError`."""
    found = model_class(config)
    try:
        with torch.device("meta"):
            # The type that grouped matrix products of experts insist on where there are no numbers.
            model: nn.Module = found._from_config(
                config, attn_implementation=NAME, dtype=torch.bfloat16
            )
    except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as error:
        raise ExecutorError(
            f"transformers cannot build the {config.model_type} model: {_short(error)}"
        ) from error
    return model.requires_grad_(False).eval()


def _short(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
