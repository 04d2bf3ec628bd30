"""Tensors of a checkpoint that have not been read, some of them to be computed from others."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from pxd.executors.protocol import ExecutorError

PIECE = 1 << 22
"""Numbers that are spread out at a time, so that what is between takes little memory."""

DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
"""By their names in safetensors."""
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Stored(Protocol):
    """A tensor that is read when it is indexed, as safetensors offers those of a file."""

    def get_shape(self) -> list[int]: ...

    def get_dtype(self) -> str: ...

    def __getitem__(self, index: Any) -> torch.Tensor:
        """`index` is ``...``, or the number of an expert where there are several."""


Tensors = Mapping[str, Stored]


class Computed:
    """A tensor that `make` returns for the parts that it is stored as, indexed alike."""

    def __init__(
        self,
        parts: tuple[Stored, ...],
        shape: list[int],
        dtype: torch.dtype,
        make: Callable[..., torch.Tensor],
    ) -> None:
        self._parts, self._shape, self._dtype, self._make = parts, shape, dtype, make

    def get_shape(self) -> list[int]:
        return self._shape

    def get_dtype(self) -> str:
        return _NAMES[self._dtype]

    def __getitem__(self, index: Any) -> torch.Tensor:
        return self._make(*(part[index] for part in self._parts)).to(self._dtype)


def spread_modules(
    tensors: Tensors,
    parts: Sequence[str],
    mark: str,
    spread: Callable[[str], Stored],
) -> dict[str, Stored]:
    """Modules that have the part `mark` get the plain weight that `spread` makes of `parts`, which
    are left out; what else there is, such as a linear layer's own bias, stays."""
    made: dict[str, Stored] = {}
    for name, tensor in tensors.items():
        module, _, part = name.rpartition(".")
        if f"{module}.{mark}" not in tensors or part not in parts:
            made[name] = tensor
        elif part == parts[0]:
            made[f"{module}.weight"] = spread(module)
    return made


def part_of(tensors: Tensors, name: str) -> Stored:
    """Raises `ExecutorError` where it is not there."""
    if name not in tensors:
        raise ExecutorError(f"the checkpoint lacks {name}")
    return tensors[name]


def check(fits: bool, name: str) -> None:
    """Raises `ExecutorError` where a tensor is not what the configuration makes of it."""
    if not fits:
        raise ExecutorError(f"{name} is not quantised as config.json says")


def dtype_of(tensor: Stored, name: str) -> torch.dtype:
    """Of plain numbers. Raises `ExecutorError` for others."""
    found = DTYPES.get(tensor.get_dtype())
    check(found is not None, name)
    return found
