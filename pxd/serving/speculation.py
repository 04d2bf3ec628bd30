"""When a pipeline's head lets requests guess their next tokens, and how many at once.

A guess costs computing and saves passes through the pipeline. So it pays where a pass takes long
whatever is in it: the links are slow for the computing that is done between them.
"""

from typing import Literal

from pxd.serving.timings import Figure, LonePass
from pxd.wire import MAX_GUESSES

Speculate = Literal["auto", "on", "off"]

BEGIN_SHARE, END_SHARE = 1.0, 0.5
"""How long a pass is under way beside computing, as a share of the computing: at least the former
for guessing to begin, less than the latter for it to end."""

LEAST_WAIT_S = 0.003
"""What a pass takes beside computing between processes of one machine, and no link matters."""

WASTE_SHARE = 0.25
"""How much longer guesses may make a pass, if none of them comes true."""


class Speculation:
    """For one pipeline. With "auto" it goes by passes of one request alone, so whether links are
    slow is found out at the first quiet moment, and stays known."""

    def __init__(self, mode: Speculate) -> None:
        self._mode = mode
        self._possible = False
        self._decode_s = 0.0
        self._pass = Figure(warm_up=4, needed=8, window=16)
        self._each = Figure(warm_up=1, needed=4, window=16)
        self._on = False

    def stages_are(self, *, decode_s: float, possible: bool) -> None:
        """All stages together take `decode_s` for one token of one request, 0 where not known.
        `possible` says that all of them can take positions back."""
        self._decode_s, self._possible = decode_s, possible

    def passed(self, lone: LonePass) -> None:
        if not lone.guesses:
            self._pass.add(lone.seconds)
        elif self._pass.value:
            self._each.add(max(0.0, lone.seconds - self._pass.value) / lone.guesses)

    def most(self) -> int:
        """How many tokens a request may guess at once, by what is known now."""
        if not self._possible or self._mode == "off":
            return 0
        if self._mode == "on":
            return MAX_GUESSES
        if not self._pass.value or not self._decode_s:
            return 0
        wait = self._pass.value - self._decode_s
        share = END_SHARE if self._on else BEGIN_SHARE
        self._on = wait >= max(share * self._decode_s, LEAST_WAIT_S)
        return self._fitting() if self._on else 0

    def _fitting(self) -> int:
        # A guess takes no more than a step of its own; how much less shows when one is made.
        each = self._each.value if self._each.known else self._decode_s
        room = WASTE_SHARE * self._pass.value
        # One is always made, or a figure from a bad moment would never change.
        return max(1, int(room / each)) if each * MAX_GUESSES > room else MAX_GUESSES
