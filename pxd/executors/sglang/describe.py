"""Describes a model for planning: what its files say, and what SGLang reads in config.json."""

import json
import tempfile
from pathlib import Path
from typing import Any

import torch

from pxd.executors.protocol import ExecutorError, ModelDescription
from pxd.executors.scratch import own_directory
from pxd.executors.sglang.loader import code_of
from pxd.executors.sglang.pinned import check_symbols
from pxd.executors.sglang.runtime import RankSpec, choose_device, server_settings
from pxd.executors.sglang.view import view_config
from pxd.models.describe import Checkpoint, describe_checkpoint
from pxd.models.errors import ModelError

_KNOWN_LAYERS = frozenset({"full_attention", "sliding_attention"})


def describe(path: Path) -> ModelDescription:
    """Describe the model in `path`, whose weights may still be missing.

    Raises `ExecutorError` where SGLang could not load it, or pxd not keep its KV.
    """
    try:
        checkpoint = describe_checkpoint(path)
    except ModelError as error:
        raise ExecutorError(str(error)) from error
    architecture, _, staged = code_of(path)
    check_symbols()
    config = _config(path, architecture, checkpoint)
    item_bytes = getattr(torch, checkpoint.dtype).itemsize
    return ModelDescription(
        architecture=checkpoint.architecture,
        layers=checkpoint.layers,
        hidden_size=config.hidden_size,
        vocabulary=config.vocab_size,
        context=config.context_len,
        layer_bytes=checkpoint.layer_bytes,
        embedding_bytes=checkpoint.embedding_bytes,
        head_bytes=checkpoint.head_bytes,
        tied=checkpoint.tied,
        kv_bytes_per_token=(_token_numbers(config) * item_bytes,) * checkpoint.layers,
        splits=tuple(range(1, checkpoint.layers)) if staged else (),
        eos=checkpoint.eos,
        fingerprint=checkpoint.fingerprint,
        unsupported="" if staged else f"SGLang cannot run {architecture} as stages of a pipeline",
    )


def _config(path: Path, architecture: str, checkpoint: Checkpoint) -> Any:
    """SGLang's `ModelConfig`."""
    from sglang.srt.configs.model_config import ModelConfig

    with tempfile.TemporaryDirectory(dir=own_directory()) as view:
        raw = view_config(path, architecture)
        (Path(view) / "config.json").write_text(json.dumps(raw))
        spec = RankSpec(
            view=view,
            start=0,
            end=checkpoint.layers,
            layers=checkpoint.layers,
            dtype=checkpoint.dtype,
            kv_bytes=0,
            kv_tokens=0,
        )
        try:
            config = ModelConfig.from_server_args(server_settings(spec, choose_device(), 1))
        except (ValueError, KeyError, TypeError, AttributeError, OSError, AssertionError) as error:
            raise ExecutorError(f"SGLang cannot run {architecture}: {error}") from error
    unknown = sorted({*(getattr(config.hf_text_config, "layer_types", None) or ())} - _KNOWN_LAYERS)
    if unknown:
        raise ExecutorError(
            f"{architecture} has layers of type {unknown[0]}, whose state pxd does not keep"
        )
    if config.model_is_mrope:
        raise ExecutorError(f"{architecture} numbers positions in several ways at once")
    return config


def _token_numbers(config: Any) -> int:
    """How many numbers one position takes in one layer."""
    from sglang.srt.configs.model_config import AttentionArch

    if config.attention_arch == AttentionArch.MLA:
        return int(config.kv_lora_rank + config.qk_rope_head_dim)
    return int(config.get_num_kv_heads(1) * (config.head_dim + config.v_head_dim))
