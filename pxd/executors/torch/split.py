"""Learns by a dry run how a model uses its layers, and so where it may be cut.

Tensors on PyTorch's meta device have shapes and gradients but no numbers, so that a model of any
size runs in a moment and no memory. In the dry run every layer's output is replaced by a fresh
tensor before the next layer sees it. Whatever a layer's output then has a gradient to, other than
the tensor given to it, crosses a cut.
"""

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from pxd.executors.torch.attention import Passing, kept_by

DRY_RUN_TOKENS = 3


class CannotSplit(Exception):
    """The model has no form that could be cut; it still runs as a whole."""


@dataclass(frozen=True)
class SplitPlan:
    """What the dry run found.

    `splits` are the layer indices at which the model may be cut; without any, `reason` says why.
    `shapes` are those of a position's keys and values by layer. `front` and `back` name the modules
    with weights that run before and behind the layers, `idle` those that never run. `tuples` says
    that a layer returns its hidden state in a tuple.
    """

    layers: int
    hidden_size: int
    vocabulary: int
    splits: tuple[int, ...]
    reason: str
    shapes: dict[int, tuple[int, int, int]]
    front: tuple[str, ...]
    back: tuple[str, ...]
    idle: tuple[str, ...]
    tuples: bool


def find_layers(model: nn.Module, count: int) -> tuple[str, nn.ModuleList]:
    """The list of decoder layers and its name. Raises `CannotSplit`."""
    found = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.ModuleList) and len(module) == count and _attends(module[0])
    ]
    if len(found) != 1:
        raise CannotSplit("its decoder layers are not one list")
    return found[0]


def _attends(layer: nn.Module) -> bool:
    return any(hasattr(module, "layer_idx") for module in layer.modules())


@dataclass
class _Run:
    """What is seen of a dry run. `leaves` maps a tensor that was handed on to the number of the
    layer that gets it."""

    calls: list[tuple[int, torch.Tensor]] = field(default_factory=list)
    leaves: dict[int, int] = field(default_factory=dict)
    kept: list[torch.Tensor] = field(default_factory=list)
    places: dict[str, str] = field(default_factory=dict)
    tuples: bool = False

    def fresh(self, like: torch.Tensor, user: int) -> torch.Tensor:
        leaf = like.detach().requires_grad_()
        self.leaves[id(leaf)] = user
        # Or another tensor could get the same id.
        self.kept.append(leaf)
        return leaf

    def sources(self, result: torch.Tensor) -> set[int]:
        """Numbers of those handed-on tensors that `result` is computed from."""
        found: set[int] = set()
        open_nodes, seen = [result.grad_fn], set()
        while open_nodes:
            node = open_nodes.pop()
            if node is None or node in seen:
                continue
            seen.add(node)
            variable = getattr(node, "variable", None)
            if variable is not None and id(variable) in self.leaves:
                found.add(self.leaves[id(variable)])
            open_nodes.extend(following for following, _ in node.next_functions)
        return found


def plan_split(model: nn.Module, count: int) -> SplitPlan:
    """Dry-run a skeleton of `count` layers. Raises `CannotSplit`.

    What the model itself raises in the dry run comes through: it would do so in use, too.
    """
    prefix, layers = find_layers(model, count)
    run, keeper = _Run(), Passing()
    handles = [*_watch_layers(run, layers), *_watch_ends(run, model, prefix, layers)]
    tokens = torch.zeros(1, DRY_RUN_TOKENS, dtype=torch.long, device="meta")
    positions = torch.arange(DRY_RUN_TOKENS, device="meta")[None]
    try:
        with torch.enable_grad(), kept_by(keeper):
            logits = model(
                input_ids=tokens, position_ids=positions, past_key_values=keeper, use_cache=True
            ).logits
    finally:
        for handle in handles:
            handle.remove()
    if [layer for layer, _ in run.calls] != list(range(count)):
        raise CannotSplit("its layers are not called once each and in order")
    hidden = run.calls[0][1]
    if hidden.ndim != 3 or any(output.shape != hidden.shape for _, output in run.calls):
        raise CannotSplit("its layers do not all return the same kind of hidden state")
    crossed = _crossed(run, logits)
    splits = tuple(cut for cut in range(1, count) if cut not in crossed)
    at = {where: [n for n, w in run.places.items() if w == where] for where in ("front", "back")}
    return SplitPlan(
        layers=count,
        hidden_size=hidden.shape[-1],
        vocabulary=logits.shape[-1],
        splits=splits,
        reason="" if splits or count == 1 else "more than the hidden state crosses every layer",
        shapes=keeper.shapes,
        front=tuple(at["front"]),
        back=tuple(at["back"]),
        idle=tuple(n for n in _weighted(model, prefix) if n not in run.places),
        tuples=run.tuples,
    )


def _watch_layers(run: _Run, layers: nn.ModuleList) -> Iterator[Any]:
    def watch(number: int) -> Any:
        def hook(_layer: nn.Module, _args: Any, output: Any) -> Any:
            hidden = output if isinstance(output, torch.Tensor) else output[0]
            run.calls.append((number, hidden))
            run.tuples = not isinstance(output, torch.Tensor)
            fresh = run.fresh(hidden, number + 1)
            return fresh if isinstance(output, torch.Tensor) else (fresh, *output[1:])

        return hook

    for number, layer in enumerate(layers):
        yield layer.register_forward_hook(watch(number))


def _watch_ends(run: _Run, model: nn.Module, prefix: str, layers: nn.ModuleList) -> Iterator[Any]:
    """When each module with weights outside the layers first runs; and what comes of tokens."""

    def watch(name: str) -> Any:
        def hook(module: nn.Module, _args: Any, output: Any) -> Any:
            run.places.setdefault(name, "back" if len(run.calls) == len(layers) else "front")
            return run.fresh(output, 0) if isinstance(module, nn.Embedding) else None

        return hook

    for name in _weighted(model, prefix):
        yield model.get_submodule(name).register_forward_hook(watch(name))


def _weighted(model: nn.Module, prefix: str) -> list[str]:
    """Names of modules outside the layers that have weights of their own."""
    return [
        name
        for name, module in model.named_modules()
        if name
        and not name.startswith(f"{prefix}.")
        and next(module.parameters(recurse=False), None) is not None
    ]


def _crossed(run: _Run, logits: torch.Tensor) -> set[int]:
    """Cuts that something besides the hidden state would have to cross."""
    crossed: set[int] = set()
    for user, result in [*run.calls, (len(run.calls), logits)]:
        for source in run.sources(result):
            # It is known in the stage of the layer that it was given to, and needed in the user's.
            crossed.update(range(source + 1, user + 1))
    return crossed
