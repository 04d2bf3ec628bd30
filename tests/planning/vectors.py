"""The reference's public vectors (data/allocation_vectors.json) as models and offers."""

import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from pxd.planning.cost.reference import read_cost_fields, to_model_cost
from pxd.planning.model import Chain, ModelCost, NodeOffer, PlanSettings

VECTORS: dict[str, Any] = json.loads(
    (Path(__file__).parent / "data" / "allocation_vectors.json").read_text()
)
GPUS: dict[str, dict[str, Any]] = VECTORS["gpus"]
KINDS = ("a100-80g", "a100-40g", "rtx5090", "rtx4090")
"""In the order of the vectors' counts."""

SHARES = PlanSettings(
    weight_share=VECTORS["ratios"]["param_mem_ratio"], kv_share=VECTORS["ratios"]["kv_mem_ratio"]
)
OTHER_SHARES = PlanSettings(weight_share=0.65, kv_share=0.25)


def model(layers: int) -> ModelCost:
    return to_model_cost(read_cost_fields({**VECTORS["model"]["fields"], "num_layers": layers}))


def offer(node: str, tflops: float, memory_gib: float) -> NodeOffer:
    return NodeOffer(id=node, memory=int(memory_gib * 2**30), tflops=tflops)


def offers(gpus: Iterable[str]) -> list[NodeOffer]:
    """One node per GPU, named after its kind and place: "rtx4090.2"."""
    return [
        offer(f"{gpu}.{place}", GPUS[gpu]["tflops_fp16"], GPUS[gpu]["memory_gb"])
        for place, gpu in enumerate(gpus)
    ]


def counted(counts: Sequence[int]) -> list[str]:
    """GPU names from counts of each kind."""
    return [gpu for gpu, count in zip(KINDS, counts, strict=True) for _ in range(count)]


def gpus_of(case: dict[str, Any]) -> list[str]:
    """Of an allocator case of either form."""
    if "gpus" in case:
        return list(case["gpus"])
    return counted(case["counts(a100-80g,a100-40g,rtx5090,rtx4090)"])


def spans(chains: Iterable[Chain]) -> list[list[int]]:
    """All ranges, sorted."""
    return sorted([start, end] for chain in chains for _, start, end in chain)


def by_kind(chains: Iterable[Chain]) -> list[list[tuple[str, int, int]]]:
    """Chains with GPU names for nodes, sorted: equal GPUs are interchangeable."""
    return sorted([(n.partition(".")[0], start, end) for n, start, end in c] for c in chains)
