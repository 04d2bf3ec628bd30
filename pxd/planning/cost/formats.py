"""How many bytes a weight takes, with the scales that come with it, in each quantisation."""

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

from pxd.planning.cost.fields import Fields

MAX_RULES = 20_000
MAX_RULES_FOR_ALL = 1024
_MAX_GROUP = 1 << 20
_LEFT_OUT = (
    "modules_to_not_convert", "llm_int8_skip_modules", "ignore", "ignored_layers",
    "exclude_modules", "exclude",
)  # fmt: skip
# Modules of layers that makers name differently.
_SAME = {
    "block_sparse_moe": "mlp",
    "feed_forward": "mlp",
    "ffn": "mlp",
    "router": "gate",
    "switch_mlp": "experts",
    "shared_expert": "shared_experts",
    "attn": "self_attn",
    "attention": "self_attn",
    "mixer": "mamba",
}
_OUTER = frozenset({"re", "model", "language_model", "transformer", "backbone", "decoder"})
_LAYER_LISTS = frozenset({"layers", "h", "blocks"})
_OTHER_TOWERS = frozenset({"visual", "vision_tower", "vision_model", "audio_tower", "mtp"})


def quant_speedup(element_bytes: float) -> float:
    """How much faster than fp16 such weights multiply, as the reference has it."""
    return max(0.1, (2 / element_bytes) * (0.8 if element_bytes < 2 else 1.0))


class Format(NamedTuple):
    """`bits` of a weight, and `overhead`: bytes of scales and zero points per weight."""

    bits: float
    overhead: float = 0.0

    def size(self, elements: int) -> int:
        return math.ceil(elements * (self.bits / 8 + self.overhead))


class _Rule(NamedTuple):
    """Matrices whose path contains these modules, one after the other, have this format."""

    modules: tuple[str, ...]
    open_end: bool
    format: Format

    def matches(self, path: tuple[str, ...]) -> bool:
        size = len(self.modules)
        for start in range(len(path) - size + 1):
            part = path[start : start + size]
            if part == self.modules:
                return True
            same_start = self.open_end and part[:-1] == self.modules[:-1]
            if same_start and part and part[-1].startswith(self.modules[-1]):
                return True
        return False


class Formats:
    """The formats of a model's matrices. `plain` is that of everything not quantised."""

    def __init__(self, fields: Fields) -> None:
        """Raises ValueError for a quantisation that cannot be right.

        A method that is not known counts as none, so that no memory is promised that is not there.
        """
        self.plain = Format(8 * fields.element_bytes)
        self.default = self.ends = self.plain
        self._rules: dict[int | None, list[_Rule]] = {None: []}
        self._found: dict[str, Format | None] = {}
        mlx = fields.mapping("quantization")
        other = fields.mapping("quantization_config") or fields.mapping("compression_config")
        if mlx or (other and "quant_method" not in other and "bits" in other):
            self._read_mlx(mlx or other)
        elif other:
            self._read(other)

    def of(self, layer: int | None, name: str) -> Format:
        """The format of a matrix such as `self_attn.q_proj`; layer None is outside the layers."""
        found = None if layer is None else _first(self._rules.get(layer, ()), name)
        if found is None:
            if name not in self._found:
                self._found[name] = _first(self._rules[None], name)
            found = self._found[name]
        return found or (self.ends if layer is None else self.default)

    def _read_mlx(self, config: Mapping[str, Any]) -> None:
        self.default = self.ends = _mlx(config)
        overrides = {
            name: _mlx(value) if isinstance(value, Mapping) else self.plain
            for name, value in config.items()
            if isinstance(value, Mapping) or value is False
        }
        self._add(overrides.items())

    def _read(self, config: Mapping[str, Any]) -> None:
        method = config.get("quant_method")
        for key in _LEFT_OUT:
            names = config.get(key)
            if isinstance(names, list | tuple):
                self._add((name, self.plain) for name in names)
        if method == "mxfp4":
            self._add([("experts", Format(4, 1 / 32))])
        elif method in ("compressed-tensors", "modelopt") and config.get("config_groups"):
            self._read_groups(config)
        else:
            self.default = _by_method(method, config) or self.plain

    def _read_groups(self, config: Mapping[str, Any]) -> None:
        groups = config["config_groups"]
        if not isinstance(groups, Mapping):
            raise ValueError("config.json says config_groups, which is no object")
        for group in groups.values():
            weights = group.get("weights") if isinstance(group, Mapping) else None
            if not isinstance(weights, Mapping):
                continue
            found = _grouped(_bits(weights, "num_bits"), weights, 2.0)
            targets = group.get("targets")
            targets = targets if isinstance(targets, list) else []
            if "Linear" in targets or not targets:
                self.default = found
            else:
                self._add((target, found) for target in targets)

    def _add(self, rules: Iterable[tuple[Any, Format]]) -> None:
        """Take patterns such as `model.layers.*.self_attn` or `re:.*mlp.gate$`.

        They are never run as regular expressions: only the names of modules in them count.
        """
        for pattern, found in rules:
            if not isinstance(pattern, str) or len(pattern) > 500:
                raise ValueError("config.json has a quantisation rule that is no module's name")
            modules = [_SAME.get(part, part) for part in re.findall(r"\w+", pattern)]
            layer = None
            while modules and modules[0] in _OUTER:
                del modules[0]
            if modules and modules[0] in _LAYER_LISTS:
                del modules[0]
                if modules and modules[0].isdecimal():
                    layer = int(modules.pop(0)[:6])
            if _OTHER_TOWERS.isdisjoint(modules) and (modules or layer is not None):
                rule = _Rule(tuple(modules), pattern.endswith("*"), found)
                self._rules.setdefault(layer, []).append(rule)
        total = sum(map(len, self._rules.values()))
        if total > MAX_RULES or len(self._rules[None]) > MAX_RULES_FOR_ALL:
            raise ValueError("config.json has too many quantisation rules")


def _first(rules: Iterable[_Rule], name: str) -> Format | None:
    path = tuple(name.split("."))
    return next((rule.format for rule in rules if rule.matches(path)), None)


def _mlx(config: Mapping[str, Any]) -> Format:
    mode = config.get("mode", "affine")
    # affine: a 16-bit scale and a 16-bit bias per group; the others: one byte of scale
    return _grouped(_bits(config, "bits"), config, 4.0 if mode == "affine" else 1.0, 64)


def _by_method(method: Any, config: Mapping[str, Any]) -> Format | None:
    if method in ("gptq", "awq", "auto-round", "autoround", "intel/auto-round"):
        bits = _bits(config, "bits") if "bits" in config else _bits(config, "w_bit")
        return _grouped(bits, config, 2.0 + bits / 8, 128)
    if method == "bitsandbytes":
        if config.get("load_in_4bit", config.get("_load_in_4bit")):
            # blocks of 64 with a float32 each, or, of those, blocks of 256 in one byte
            double = bool(config.get("bnb_4bit_use_double_quant"))
            return Format(4, (1 + 4 / 256) / 64 if double else 4 / 64)
        return Format(8)
    if method in ("fp8", "fbgemm_fp8", "finegrained_fp8", "eetq"):
        block = config.get("weight_block_size")
        sides = block[:2] if isinstance(block, list | tuple) else ()
        area = math.prod(side for side in sides if isinstance(side, int) and 0 < side < _MAX_GROUP)
        return Format(8, 4 / area if sides else 0.0)
    algorithm = str(config.get("quant_algo", ""))[:40].upper()
    if algorithm:
        return Format(4, 1 / 16) if "FP4" in algorithm else Format(4 if "W4" in algorithm else 8)
    return _grouped(_bits(config, "bits"), config, 4.0) if "bits" in config else None


def _grouped(bits: float, config: Mapping[str, Any], scale: float, usual: int = 0) -> Format:
    """A format with `scale` bytes for each group; rows without groups have next to none."""
    group = config.get("group_size")
    group = usual if group is None else group
    if not isinstance(group, int) or not -1 <= group <= _MAX_GROUP:
        raise ValueError("config.json says a quantisation group_size that cannot be right")
    if config.get("type") == "float" and bits == 4:
        scale = 1.0
    return Format(bits, scale / group if group > 0 else 0.0)


def _bits(config: Mapping[str, Any], name: str) -> float:
    bits = config.get(name)
    if isinstance(bits, bool) or not isinstance(bits, int | float) or not 1 <= bits <= 16:
        raise ValueError(f"config.json says a quantisation {name} that cannot be right")
    return float(bits)
