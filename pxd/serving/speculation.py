"""When a pipeline's head lets requests guess their next tokens, and how many at once.

A guess costs computing and saves passes through the pipeline. So it pays where a pass takes long
whatever is in it: the links are slow for the computing that is done between them.
"""

from typing import Literal

import msgspec

from pxd.serving.timings import Figure
from pxd.wire import MAX_GUESSES

Speculate = Literal["auto", "on", "off"]

BEGIN_SHARE, END_SHARE = 1.0, 0.5
"""How long a pass is under way beside computing, as a share of the computing: at least the former
for guessing to begin, less than the latter for it to end."""

LEAST_WAIT_S = 0.003
"""What a pass takes beside computing between processes of one machine, and no link matters."""

WASTE_SHARE = 0.25
"""How much longer guesses may make a pass, if none of them comes true."""


class Costs(msgspec.Struct, frozen=True):
    """What all stages of a pipeline take together, in seconds, 0 where not all have measured it:
    one decode step of one request, and one prompt token within a long chunk."""

    decode_s: float = 0.0
    prefill_s: float = 0.0


class Speculation:
    """For one pipeline. With "auto" it goes by passes of one request alone that draw one token, so
    whether links are slow is found out at the first quiet moment, and stays known."""

    def __init__(self, mode: Speculate) -> None:
        self._mode = mode
        self._possible = False
        self._costs = Costs()
        self._pass = Figure(warm_up=4, needed=8, window=16)
        self._on = False

    def stages_are(self, costs: Costs, *, possible: bool) -> None:
        """`possible` says that all stages can take positions back."""
        self._costs, self._possible = costs, possible

    def passed(self, seconds: float) -> None:
        """A pass took this long from the head and back to it."""
        self._pass.add(seconds)

    def most(self) -> int:
        """How many tokens a request may guess at once, by what is known now."""
        costs = self._costs
        if not self._possible or self._mode == "off":
            return 0
        if self._mode == "on":
            return MAX_GUESSES
        if not self._pass.value or not costs.decode_s:
            return 0
        wait = self._pass.value - costs.decode_s
        share = END_SHARE if self._on else BEGIN_SHARE
        self._on = wait >= max(share * costs.decode_s, LEAST_WAIT_S)
        # A position more takes less than a step of its own, mostly as long as a prompt's.
        each = min(costs.prefill_s or costs.decode_s, costs.decode_s)
        fitting = int(WASTE_SHARE * self._pass.value / each)
        return min(fitting, MAX_GUESSES) if self._on else 0
