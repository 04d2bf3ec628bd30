"""Turns logits into tokens: greedily on the device, otherwise by `pxd.engine.sampling`."""

from collections.abc import Sequence

import torch

from pxd.engine.sampling import Sampler
from pxd.executors.draws import Choices
from pxd.executors.protocol import Drawn
from pxd.executors.trouble import NotFinite


def draw(
    logits: torch.Tensor, draws: Sequence[tuple[int, int]], samplers: Sequence[Sampler]
) -> list[Drawn]:
    """One token for each row of `logits` ``(rows, vocabulary)``; `draws` are (request, position).

    Only rows that need more than the greatest logit leave the device. Raises `NotFinite`.
    """
    finite = torch.isfinite(torch.logsumexp(logits.float(), dim=-1))
    greatest = torch.argmax(logits, dim=-1)
    if not bool(finite.all()):
        bad = {draws[row][0] for row, fine in enumerate(finite.tolist()) if not fine}
        raise NotFinite("the logits", tuple(sorted(bad)))
    choices = Choices(samplers, [position for _, position in draws])
    wanted = choices.wanted
    free = logits[wanted].float().cpu().numpy() if wanted else None
    return choices.tokens(greatest.tolist(), free)
