"""Figures of common machines, as their makers state them.

Compute is dense FP16 matrix arithmetic with FP32 accumulation, without sparsity: what matrix
libraries reach for, and for GeForce cards half of the figure with FP16 accumulation. Apple
publishes none for most chips since the M2, nor do others for some unified-memory machines; those
rows are computed from cores and clock or from another number format, and their source says so. A
chip that is sold with fewer cores has the figures of the most that come with that memory.

Memory is in GiB (what makers call GB), memory bandwidth in GB/s (1e9), of one card or machine.
"""

import difflib
import math
import re
from collections import Counter

import msgspec

from pxd.planning.model import NodeOffer

_GIB = 1 << 30
_SUGGESTIONS = 4
_NOISE = re.compile(r"^(nvidia|geforce|tesla|apple|amd|radeon|rtx|rx)+")
_NICKNAMES = {"strixhalo": "ryzenaimax395", "gb10": "dgxspark"}
_UNIT = re.compile(r"(?<=\d)\s*(gib|gb|g)(?![a-z0-9])")


class Machine(msgspec.Struct, frozen=True):
    """`tflops` in TFLOP/s, `memory_gib` in GiB, `bandwidth` in GB/s; `source`: whose figures.

    `device` is "cuda", "rocm" or "mlx".
    """

    name: str
    device: str
    tflops: float
    memory_gib: float
    bandwidth: float
    source: str

    def offer(self, node: str, num_gpus: int = 1) -> NodeOffer:
        """What a node with so many of these offers: all of their memory."""
        return NodeOffer(
            id=node,
            memory=math.floor(num_gpus * self.memory_gib * _GIB),
            tflops=num_gpus * self.tflops,
            bandwidth=num_gpus * self.bandwidth,
        )


_AMPERE = "NVIDIA Ampere GA102 whitepaper, FP16 tensor with FP32 accumulate"
_AMPERE_X2 = "NVIDIA GeForce RTX 30 specifications; FP16 tensor is twice FP32 (GA102 whitepaper)"
_ADA = "NVIDIA Ada whitepaper, FP16 tensor with FP32 accumulate"
_ADA_X2 = "NVIDIA GeForce RTX 40 specifications; FP16 tensor is twice FP32 (Ada whitepaper)"
_BLACKWELL = "NVIDIA RTX Blackwell whitepaper, FP16 tensor with FP32 accumulate"
_BLACKWELL_X2 = "NVIDIA GeForce RTX 50 specifications; FP16 tensor is twice FP32 (whitepaper)"

_CARDS: tuple[tuple[str, float, float, float, str], ...] = (
    ("rtx-3060-12", 25.5, 12, 360, _AMPERE_X2),
    ("rtx-3070", 40.6, 8, 448, _AMPERE),
    ("rtx-3080-10", 59.5, 10, 760, _AMPERE),
    ("rtx-3080-ti", 68.2, 12, 912, _AMPERE_X2),
    ("rtx-3090", 71.0, 24, 936, _AMPERE),
    ("rtx-3090-ti", 80.0, 24, 1008, _AMPERE_X2),
    ("rtx-4060", 30.2, 8, 272, _ADA_X2),
    ("rtx-4060-ti-8", 44.1, 8, 288, _ADA_X2),
    ("rtx-4060-ti-16", 44.1, 16, 288, _ADA_X2),
    ("rtx-4070", 58.3, 12, 504, _ADA_X2),
    ("rtx-4070-super", 71.0, 12, 504, _ADA_X2),
    ("rtx-4070-ti", 80.2, 12, 504, _ADA_X2),
    ("rtx-4070-ti-super", 88.2, 16, 672, _ADA_X2),
    ("rtx-4080", 97.5, 16, 717, _ADA),
    ("rtx-4080-super", 104.4, 16, 736, _ADA_X2),
    ("rtx-4090", 165.2, 24, 1008, _ADA),
    ("rtx-5060", 38.4, 8, 448, _BLACKWELL_X2),
    ("rtx-5060-ti-8", 47.4, 8, 448, _BLACKWELL_X2),
    ("rtx-5060-ti-16", 47.4, 16, 448, _BLACKWELL_X2),
    ("rtx-5070", 61.7, 12, 672, _BLACKWELL),
    ("rtx-5070-ti", 87.9, 16, 896, _BLACKWELL),
    ("rtx-5080", 112.6, 16, 960, _BLACKWELL),
    ("rtx-5090", 209.5, 32, 1792, _BLACKWELL),
    ("rtx-a4000", 76.7, 16, 448, "NVIDIA RTX A4000 datasheet, tensor figure without sparsity"),
    ("rtx-a5000", 111.1, 24, 768, "NVIDIA RTX A5000 datasheet, tensor figure without sparsity"),
    ("rtx-a6000", 154.8, 48, 768, "NVIDIA RTX A6000 datasheet, tensor figure without sparsity"),
    ("rtx-6000-ada", 364.2, 48, 960, "NVIDIA RTX 6000 Ada datasheet, a quarter of sparse FP8"),
    ("rtx-pro-6000", 503.8, 96, 1792, "NVIDIA RTX PRO Blackwell whitepaper, FP16 tensor"),
    ("t4", 65.0, 16, 320, "NVIDIA T4 datasheet"),
    ("v100-16", 125.0, 16, 900, "NVIDIA V100 datasheet, SXM2"),
    ("v100-32", 125.0, 32, 900, "NVIDIA V100 datasheet, SXM2"),
    ("a10", 125.0, 24, 600, "NVIDIA A10 datasheet"),
    ("a30", 165.0, 24, 933, "NVIDIA A30 datasheet"),
    ("a40", 149.7, 48, 696, "NVIDIA A40 datasheet"),
    ("a100-40", 312.0, 40, 1555, "NVIDIA A100 datasheet, 40 GB"),
    ("a100-80", 312.0, 80, 2039, "NVIDIA A100 datasheet, 80 GB SXM"),
    ("a100-80-pcie", 312.0, 80, 1935, "NVIDIA A100 datasheet, 80 GB PCIe"),
    ("l4", 121.0, 24, 300, "NVIDIA L4 datasheet, half of the sparse figure"),
    ("l40", 181.0, 48, 864, "NVIDIA L40 datasheet"),
    ("l40s", 362.0, 48, 864, "NVIDIA L40S datasheet"),
    ("h100", 989.4, 80, 3350, "NVIDIA H100 datasheet, SXM, half of the sparse figure"),
    ("h100-pcie", 756.5, 80, 2000, "NVIDIA H100 datasheet, PCIe, half of the sparse figure"),
    ("h100-nvl", 835.5, 94, 3900, "NVIDIA H100 datasheet, NVL, half of the sparse figure"),
    ("h200", 989.4, 141, 4800, "NVIDIA H200 datasheet, SXM, half of the sparse figure"),
    ("h200-nvl", 835.5, 141, 4800, "NVIDIA H200 datasheet, NVL, half of the sparse figure"),
    ("b200", 2250.0, 180, 8000, "NVIDIA DGX B200 datasheet, an eighth, without sparsity"),
    ("dgx-spark", 125.0, 128, 273, "NVIDIA DGX Spark specifications; FP16 is 1/8 of sparse FP4"),
    ("jetson-agx-orin-64", 42.5, 64, 204.8, "NVIDIA Jetson AGX Orin brief; half of dense INT8"),
    ("jetson-orin-nano-super-8", 17.0, 8, 102, "NVIDIA Jetson Orin Nano Super specifications"),
    ("rx-7800-xt", 74.6, 16, 624, "AMD Radeon RX 7800 XT specifications"),
    ("rx-7900-xt", 103.0, 20, 800, "AMD Radeon RX 7900 XT specifications"),
    ("rx-7900-xtx", 122.8, 24, 960, "AMD Radeon RX 7900 XTX specifications"),
    ("rx-9070", 145.0, 16, 640, "AMD Radeon RX 9070 specifications, FP16 matrix"),
    ("rx-9070-xt", 195.0, 16, 640, "AMD Radeon RX 9070 XT specifications, FP16 matrix"),
    ("radeon-pro-w7900", 122.6, 48, 864, "AMD Radeon PRO W7900 specifications"),
    ("mi210", 181.0, 64, 1638, "AMD Instinct MI210 datasheet"),
    ("mi300x", 1307.4, 192, 5300, "AMD Instinct MI300X datasheet"),
    ("mi325x", 1307.4, 256, 6000, "AMD Instinct MI325X datasheet"),
)

_APPLE = "Apple newsroom; GPU TFLOP/s as published"
_APPLE_CORES = "Apple specifications; {} GPU cores x 256 FLOP x {} GHz"
_HALO = "AMD Ryzen AI Max specifications; 40 CU x 512 FLOP x 2.9 GHz"

_UNIFIED: tuple[tuple[str, float, float, tuple[int, ...], str], ...] = (
    ("m1", 2.6, 68, (8, 16), _APPLE),
    ("m1-pro", 5.2, 200, (16, 32), _APPLE),
    ("m1-max", 10.4, 400, (32, 64), _APPLE),
    ("m1-ultra", 21.0, 800, (64, 128), _APPLE),
    ("m2", 3.6, 100, (8, 16, 24), _APPLE),
    ("m2-pro", 6.8, 200, (16, 32), _APPLE_CORES.format(19, "1.4")),
    ("m2-max", 13.6, 400, (32, 64, 96), _APPLE_CORES.format(38, "1.4")),
    ("m2-ultra", 27.2, 800, (64, 128, 192), _APPLE_CORES.format(76, "1.4")),
    ("m3", 3.6, 100, (8, 16, 24), _APPLE_CORES.format(10, "1.4")),
    ("m3-pro", 6.4, 150, (18, 36), _APPLE_CORES.format(18, "1.4")),
    ("m3-max", 10.7, 300, (36, 96), _APPLE_CORES.format(30, "1.4")),
    ("m3-max", 14.2, 400, (48, 64, 128), _APPLE_CORES.format(40, "1.4")),
    ("m3-ultra", 21.4, 819, (96,), _APPLE_CORES.format(60, "1.4")),
    ("m3-ultra", 28.5, 819, (256, 512), _APPLE_CORES.format(80, "1.4")),
    ("m4", 3.8, 120, (16, 24, 32), _APPLE_CORES.format(10, "1.47")),
    ("m4-pro", 8.1, 273, (24, 48, 64), _APPLE_CORES.format(20, "1.58")),
    ("m4-max", 12.9, 410, (36,), _APPLE_CORES.format(32, "1.58")),
    ("m4-max", 16.2, 546, (48, 64, 128), _APPLE_CORES.format(40, "1.58")),
    ("ryzen-ai-max-395", 59.4, 256, (64, 96, 128), _HALO),
)


def _device(source: str) -> str:
    return {"NVIDIA": "cuda", "AMD": "rocm", "Apple": "mlx"}[source.split()[0]]


MACHINES: tuple[Machine, ...] = (
    *(
        Machine(name, _device(source), tflops, memory, bandwidth, source)
        for name, tflops, memory, bandwidth, source in _CARDS
    ),
    *(
        Machine(f"{chip}-{memory}", _device(source), tflops, memory, bandwidth, source)
        for chip, tflops, bandwidth, memories, source in _UNIFIED
        for memory in memories
    ),
)


def _key(name: str) -> str:
    """What two spellings of one machine have in common."""
    key = re.sub(r"[^a-z0-9]", "", _UNIT.sub("", name.casefold()))
    key = _NOISE.sub("", key) or key
    for nickname, known in _NICKNAMES.items():
        key = key.replace(nickname, known)
    return key


def _index() -> dict[str, Machine]:
    """By name; by name and memory; by the name alone where memory tells nothing apart."""
    stems = Counter(machine.name.removesuffix(f"-{machine.memory_gib:g}") for machine in MACHINES)
    found = {_key(machine.name): machine for machine in MACHINES}
    for machine in MACHINES:
        found.setdefault(_key(f"{machine.name}-{machine.memory_gib:g}"), machine)
        stem = machine.name.removesuffix(f"-{machine.memory_gib:g}")
        if stems[stem] == 1:
            found.setdefault(_key(stem), machine)
    return found


_BY_KEY = _index()


def find_machine(name: str) -> Machine:
    """The machine of that name, whatever its spelling: "RTX 4090", "rtx4090-24gb", "a100-80g".

    Raises ValueError with near names when there is none.
    """
    machine = _BY_KEY.get(_key(name))
    if machine is None:
        near = _near(name)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(f"there is no machine {name!r} in the catalogue{hint}")
    return machine


def _near(name: str) -> list[str]:
    key = _key(name)
    begin = [machine.name for machine in MACHINES if key and _key(machine.name).startswith(key)]
    if not begin:
        names = [machine.name for machine in MACHINES]
        begin = difflib.get_close_matches(name.casefold(), names, _SUGGESTIONS)
    return begin[:_SUGGESTIONS]
