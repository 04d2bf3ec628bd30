"""Brings SGLang's runtime up for one stage, without its server, scheduler or process launcher.

SGLang is told of a pipeline of up to three parts: what is before the own layers, these, and what is
behind them. It then builds just its own part; since no `torch.distributed` connects the parts, the
group that stands for the pipeline only knows who is where. The runtime can be set up once in a
process.
"""

import logging
import os
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import msgspec
import torch

from pxd.engine.blocks import BLOCK_TOKENS
from pxd.executors.protocol import ExecutorError
from pxd.executors.sglang.passes import MOST_ENTRIES

CPU_ENGINE = "SGLANG_USE_CPU_ENGINE"
"""SGLang's own setting, without which it does not run on a CPU at all."""

JOIN_TIMEOUT_S = 300
MEMORY_SHARE = 0.95
"""Of a GPU's memory, for weights and KV; the KV budget is mostly less."""


class RankSpec(msgspec.Struct, frozen=True, kw_only=True):
    """One of `size` processes that run layers [start, end) of `layers` together, one on each GPU.

    `view` is a directory as `pxd.executors.sglang.view` makes it, `meeting` the descriptor of a
    file that all of them have open, `dtype` torch's name of the model's numbers. `kv_bytes` is for
    all ranks together; with 0 there is room for `kv_tokens` positions.
    """

    view: str
    start: int
    end: int
    layers: int
    dtype: str
    kv_bytes: int
    kv_tokens: int
    meeting: int = -1
    rank: int = 0
    size: int = 1


def choose_device(ranks: int = 1) -> str:
    """Raises `ExecutorError` where SGLang has nothing to run on, or too few GPUs for `ranks`."""
    if torch.cuda.is_available() and torch.version.hip is None:
        if torch.cuda.device_count() < ranks:
            raise ExecutorError(
                f"--tp {ranks} needs as many GPUs, and PyTorch sees {torch.cuda.device_count()}"
            )
        return "cuda"
    if os.environ.get(CPU_ENGINE) == "1":
        return "cpu"
    raise ExecutorError("SGLang needs an NVIDIA GPU, and PyTorch sees none here")


def parts_of(start: int, end: int, layers: int) -> tuple[int, list[int]]:
    """The own place in the pipeline that SGLang is told of, and how many layers each part has."""
    parts = [part for part in (start, end - start, layers - end) if part]
    return int(start > 0), parts


class PipelinePlace:
    """Stands for SGLang's pipeline group. Asked to transport anything, it fails."""

    first_rank = 0

    def __init__(self, real: Any, place: int, size: int) -> None:
        self.rank_in_group = self.rank = place
        self.world_size = size
        self.ranks = list(range(size))
        self.last_rank = size - 1
        self.is_first_rank, self.is_last_rank = place == 0, place == size - 1
        self.local_rank, self.device = real.local_rank, real.device

    def __getattr__(self, name: str) -> Any:
        # Python itself asks for such names, to see whether they are there.
        if name.startswith("__"):
            raise AttributeError(name)
        raise AttributeError(f"stages are not connected by torch.distributed: {name} is not there")


def open_runner(spec: RankSpec) -> Any:
    """A `ModelRunner` with weights, KV pool and attention of its rank. Waits for the other ranks.

    Raises whatever SGLang raises. What is set up stays so for the life of the process.
    """
    device = choose_device(spec.size)
    place, parts = parts_of(spec.start, spec.end, spec.layers)
    os.environ["SGLANG_PP_LAYER_PARTITION"] = ",".join(map(str, parts))
    # Ranks meet in a file in memory that nobody else can open, not at a port; and orders reach
    # them otherwise than through SGLang.
    meeting = f"file:///proc/self/fd/{spec.meeting}"
    os.environ["SGLANG_DISTRIBUTED_INIT_METHOD_OVERRIDE"] = meeting
    os.environ["SGLANG_USE_MESSAGE_QUEUE_BROADCASTER"] = "0"

    from sglang.srt.configs.model_config import ModelConfig
    from sglang.srt.distributed import bootstrap, parallel_state
    from sglang.srt.layers.moe import initialize_moe_config
    from sglang.srt.model_executor.model_runner import ModelRunner
    from sglang.srt.runtime_context import SpawnRanks, get_parallel, publish

    logging.getLogger("sglang").setLevel(logging.WARNING)
    settings = server_settings(spec, device, len(parts))
    ranks = SpawnRanks(world_rank=place * spec.size + spec.rank, gpu_id=spec.rank)
    publish(settings, role="scheduler", ranks=ranks)
    with get_parallel().override(pp_size=1, pp_rank=0):
        bootstrap.init_parallel_runtime(server_args=settings, device=device, dist_port=0)
    initialize_moe_config()
    if len(parts) > 1:
        group = PipelinePlace(parallel_state.get_pp_group(), place, len(parts))
        _forever.enter_context(parallel_state.patch_pipeline_parallel_group(group))
    config = ModelConfig.from_server_args(settings)
    bootstrap.init_layer_runtime(model_config=config)
    with _unwritten_as_nan():
        runner = ModelRunner(
            model_config=config,
            mem_fraction_static=MEMORY_SHARE,
            gpu_id=spec.rank,
            nccl_port=0,
            server_args=settings,
        )
    _allocate_blocks(runner, spec)
    runner.init_attention_backends()
    runner.init_cuda_graphs()
    return runner


_forever = ExitStack()
"""Patches that hold for the life of the process."""


def server_settings(spec: RankSpec, device: str, parts: int) -> Any:
    """SGLang's `ServerArgs`."""
    from sglang.srt.server_args import ServerArgs

    return ServerArgs(
        model_path=spec.view,
        device=device,
        dtype=spec.dtype,
        tp_size=spec.size,
        pp_size=parts,
        page_size=BLOCK_TOKENS,
        max_running_requests=MOST_ENTRIES,
        mem_fraction_static=MEMORY_SHARE,
        attention_backend="torch_native" if device == "cpu" else None,
        sampling_backend="pytorch",
        # The head decides on batches, prefixes and tokens; SGLang's parts for that are not used.
        disable_radix_cache=True,
        disable_overlap_schedule=True,
        skip_tokenizer_init=True,
        # One pool for layers of every kind, since a block is one page of it.
        disable_hybrid_swa_memory=True,
        # Their replay has not been tried with a pipeline whose parts are elsewhere.
        disable_cuda_graph=True,
        dist_timeout=JOIN_TIMEOUT_S,
        log_level="warning",
        random_seed=0,
    )


def _allocate_blocks(runner: Any, spec: RankSpec) -> None:
    """Have SGLang allocate as many positions of KV as the budget allows for, by its own account."""
    from sglang.srt.runtime_context import get_schedule

    tokens = spec.kv_tokens
    if spec.kv_bytes:
        runner.init_kv_cache_configurator()
        budget = runner.kv_cache_configurator.config_from_budget(spec.kv_bytes // spec.size)
        tokens = budget.max_total_num_tokens
    with get_schedule().override(max_total_tokens=tokens):
        runner.alloc_memory_pool()


@contextmanager
def _unwritten_as_nan() -> Iterator[None]:
    """Fill memory that is taken for tensors with NaN meanwhile.

    SGLang does not say when a checkpoint lacks a tensor; its parameter would be whatever was there.
    """
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)
