"""The one release of SGLang that this executor is written against, and what it uses of it.

SGLang keeps no interface stable that reaches below its server: names move with every release. So
another release is refused by its number, and one that was changed by what it lacks.
"""

import importlib
from importlib import metadata

from pxd.executors.protocol import ExecutorError

VERSION = "0.5.23"

_ADVICE = f"install the release that pxd is written against: pip install 'sglang=={VERSION}'"

SYMBOLS: dict[str, tuple[str, ...]] = {
    "sglang.srt.configs.model_config": ("ModelConfig", "ModelConfig.from_server_args"),
    "sglang.srt.distributed.bootstrap": ("init_parallel_runtime", "init_layer_runtime"),
    "sglang.srt.distributed.parallel_state": ("get_pp_group", "patch_pipeline_parallel_group"),
    "sglang.srt.layers.moe": ("initialize_moe_config",),
    "sglang.srt.layers.utils": ("PPMissingLayer",),
    "sglang.srt.mem_cache.memory_pool": ("MHATokenToKVPool", "MLATokenToKVPool"),
    "sglang.srt.model_executor.forward_batch_info": (
        "CaptureHiddenMode",
        "ForwardBatch",
        "ForwardBatch._init_num_token_non_padded",
        "ForwardMode",
        "PPProxyTensors",
        "compute_position",
    ),
    "sglang.srt.model_executor.model_runner": (
        "ModelRunner",
        "ModelRunner.alloc_memory_pool",
        "ModelRunner.forward",
        "ModelRunner.init_attention_backends",
        "ModelRunner.init_cuda_graphs",
        "ModelRunner.init_kv_cache_configurator",
    ),
    "sglang.srt.models.registry": ("ModelRegistry",),
    "sglang.srt.runtime_context": ("SpawnRanks", "get_parallel", "get_schedule", "publish"),
    "sglang.srt.server_args": ("ServerArgs",),
    "sglang.srt.speculative.spec_info": ("SpeculativeAlgorithm",),
}
"""By module, what is called by name. Attributes that objects have once they are made are not seen
here; what lacks one fails when a stage is loaded."""


def check_version() -> None:
    """Raises `ImportError` where SGLang is not installed, or in another release. Takes no time."""
    try:
        installed = metadata.version("sglang")
    except metadata.PackageNotFoundError as error:
        raise ImportError(f"SGLang is not installed; {_ADVICE}") from error
    if installed != VERSION:
        raise ImportError(f"SGLang {installed} is installed; {_ADVICE}")


def check_symbols(symbols: dict[str, tuple[str, ...]] | None = None) -> None:
    """Raises `ExecutorError` naming everything that the installed SGLang lacks. Imports it."""
    lacking = []
    for name, wanted in (SYMBOLS if symbols is None else symbols).items():
        try:
            module = importlib.import_module(name)
        except ImportError as error:
            lacking.append(f"{name} ({error})")
        else:
            lacking += [f"{name}.{path}" for path in wanted if not _has(module, path)]
    if lacking:
        raise ExecutorError(
            f"this SGLang {VERSION} is not as it was released: it lacks {', '.join(lacking)}; "
            "install it anew"
        )


def _has(holder: object, path: str) -> bool:
    for name in path.split("."):
        if not hasattr(holder, name):
            return False
        holder = getattr(holder, name)
    return True
