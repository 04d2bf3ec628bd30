"""Whether hidden states are made smaller for their way to the next stage."""

from pxd.settings import WireDtype
from pxd.wire import Coding

STAYS = 0.5
"""A coding that was chosen stays until there is no need for it by this factor."""


def choose_coding(
    setting: WireDtype,
    before: Coding | None = None,
    *,
    hidden_bytes: int = 0,
    bandwidth: float = 0.0,
    position_s: float = 0.0,
) -> Coding | None:
    """How a stage codes what it sends. `auto` means fp8 where the link is what the stage waits for.

    `hidden_bytes` is what one position takes as it is, `bandwidth` the link's in GB/s, and
    `position_s` the seconds that the stage computes for one position of a prompt; 0 where it is not
    known. While one step is sent the next one is computed. So a link that takes less time for a
    position than the computing does holds nobody up, and there is nothing to gain that would be
    worth inexact answers. Over one that takes longer, half the bytes are up to twice the tokens.
    Steps that only decode compute for longer per position, so what is fast enough for prompts is
    fast enough for them.
    """
    if setting != "auto":
        return None if setting == "native" else setting
    if not (bandwidth and position_s):
        return None
    sending_s = hidden_bytes / (bandwidth * 1e9)
    return "fp8" if sending_s > position_s * (STAYS if before else 1.0) else None
