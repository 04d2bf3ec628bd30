"""Finds a model's decoder layers: the one list that `model.layers` shows."""

from dataclasses import dataclass
from typing import Any

import mlx.nn as nn


@dataclass(frozen=True)
class LayerList:
    """Where the list hangs: `owner[key]`. Parameters of layer i are named ``{prefix}{i}.…``."""

    owner: nn.Module
    key: str
    prefix: str

    @property
    def layers(self) -> list[Any]:
        return self.owner[self.key]

    def replace(self, layers: list[Any]) -> None:
        self.owner[self.key][:] = layers


class CannotSplit(Exception):
    """The model has no form that could be cut; it still runs as a whole."""


def find_layers(model: nn.Module) -> LayerList:
    """Raises `CannotSplit` where `model.layers` is not backed by a single list."""
    shown = getattr(model, "layers", None)
    if not isinstance(shown, list) or not shown:
        raise CannotSplit("its decoder layers are not one list")
    for name, module in model.named_modules():
        for key, value in module.items():
            same = isinstance(value, list) and len(value) == len(shown)
            if same and all(a is b for a, b in zip(value, shown, strict=True)):
                return LayerList(module, key, f"{name}.{key}." if name else f"{key}.")
    raise CannotSplit("its decoder layers are not one list")


class Standin(nn.Module):
    """Stands at a layer's place and passes for it: models look at types and attributes of layers.

    The layer itself stays out of the module tree: its parameters are no longer the model's.
    """

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.hide("layer", layer)

    def hide(self, name: str, value: Any) -> None:
        """Set an attribute that is not part of the module tree."""
        object.__setattr__(self, name, value)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        """What `isinstance` goes by, besides the real type."""
        return type(object.__getattribute__(self, "layer"))

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(object.__getattribute__(self, "layer"), name)
