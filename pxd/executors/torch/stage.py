"""Runs layers [start, end) of a transformers model by the model's own code.

The model's `forward` stays in charge of positions, masks, scales and layer order. Layers of other
stages are replaced, each at its own index, by stand-ins that do nothing. The one before `start`
brings the incoming hidden state in; what the last own layer returns is tapped.
"""

from typing import Any

import torch
from torch import nn

from pxd.executors.torch.attention import Keeper, kept_by
from pxd.executors.torch.split import SplitPlan, find_layers


class _Boundary:
    """The hidden state on its way into and out of the own layers, during one forward pass."""

    incoming: torch.Tensor | None = None
    outgoing: torch.Tensor | None = None


class _Absent(nn.Module):
    """A layer of another stage: hands its input on, or brings the hidden state in."""

    def __init__(self, layer: nn.Module, boundary: _Boundary | None, tuples: bool) -> None:
        super().__init__()
        self._boundary, self._tuples = boundary, tuples
        # Models look at such things as the type of a layer.
        for name, value in vars(layer).items():
            if isinstance(value, str | int) and not hasattr(self, name):
                setattr(self, name, value)

    def forward(self, hidden: Any, *_args: Any, **_kwargs: Any) -> Any:
        if self._boundary is not None:
            hidden = self._boundary.incoming
        return (hidden,) if self._tuples else hidden


class _Removed(nn.Module):
    """Stands where a module at an end of the model was: what comes of it is not used."""

    def forward(self, given: torch.Tensor, *_args: Any, **_kwargs: Any) -> torch.Tensor:
        # Something that can be added to hidden states, where positions or tokens came in.
        return given if given.is_floating_point() else torch.zeros((), device=given.device)


def stage_class(base: type[nn.Module], plan: SplitPlan, start: int, end: int) -> type[nn.Module]:
    """A model class like `base`, of which only what the stage needs will be loaded."""

    def make(self: Any, config: Any) -> None:
        base.__init__(self, config)
        self.stage_boundary = _cut(self, plan, start, end)

    return type(base.__name__, (base,), {"__init__": make, "__module__": base.__module__})


def _cut(model: Any, plan: SplitPlan, start: int, end: int) -> _Boundary:
    boundary = _Boundary()
    _, layers = find_layers(model, plan.layers)
    for number in range(plan.layers):
        if not start <= number < end:
            brings_in = boundary if number == start - 1 else None
            layers[number] = _Absent(layers[number], brings_in, plan.tuples)
    tied = model.config.get_text_config().tie_word_embeddings
    removed = list(plan.idle)
    if start > 0:
        embedding = model.get_input_embeddings()
        removed += [
            name
            for name in plan.front
            # The last stage's projection takes its weights from there.
            if not (end == plan.layers and tied and model.get_submodule(name) is embedding)
        ]
    if end < plan.layers:
        removed += plan.back
        layers[end - 1].register_forward_hook(_tap(boundary))
    for name in removed:
        model.set_submodule(name, _Removed())
    return boundary


def _tap(boundary: _Boundary) -> Any:
    def hook(_layer: nn.Module, _args: Any, output: Any) -> None:
        boundary.outgoing = output if isinstance(output, torch.Tensor) else output[0]

    return hook


class Stage:
    """Layers [start, end) with their weights; the first embeds, the last projects."""

    def __init__(self, model: Any, plan: SplitPlan, start: int, end: int) -> None:
        self.model = model
        self.first, self.last = start == 0, end == plan.layers
        self.layers, self.hidden_size = end - start, plan.hidden_size
        self.vocabulary = plan.vocabulary
        self.shapes = {layer: plan.shapes[layer] for layer in range(start, end)}
        self.dtype: torch.dtype = model.dtype
        self.device: torch.device = model.device
        self._boundary: _Boundary = model.stage_boundary

    @property
    def weight_bytes(self) -> int:
        # Tied weights count once.
        tensors = (*self.model.parameters(), *self.model.buffers())
        return sum({t.data_ptr(): t.nbytes for t in tensors}.values())

    def forward(
        self,
        inputs: torch.Tensor,
        positions: torch.Tensor,
        keeper: Keeper | None,
        wanted: torch.Tensor,
    ) -> torch.Tensor:
        """Run token ids ``(n,)`` or hidden states ``(n, hidden)`` at `positions` ``(n,)``.

        Returns hidden states ``(n, hidden)``, or on the last stage logits ``(wanted, vocabulary)``
        for the places in `wanted`. Without a `keeper`, attention is the model's own.
        """
        given: dict[str, Any] = {"position_ids": positions[None], "logits_to_keep": wanted}
        if self.first:
            given["input_ids"] = inputs[None].long()
        else:
            given["inputs_embeds"] = self._boundary.incoming = inputs[None].to(self.dtype)
        if not self.last:
            given["logits_to_keep"] = 1
        keeps = keeper is not None
        with torch.inference_mode(), kept_by(keeper):
            logits = self.model(**given, past_key_values=keeper, use_cache=keeps).logits
        outgoing = self._boundary.outgoing
        self._boundary.incoming = self._boundary.outgoing = None
        if self.last:
            return logits[0]
        if outgoing is None:
            raise RuntimeError("the model did not call the last layer of this stage")
        return outgoing[0]
