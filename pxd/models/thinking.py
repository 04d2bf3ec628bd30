"""Tells what a model thinks from what it says, while the text comes in.

mlx-lm knows the same markers, but its module cannot be imported without MLX, which a node that
takes requests need not have.
"""

import re
from typing import Any, Literal, NamedTuple


class Markers(NamedTuple):
    """What stands before and after a model's thoughts; `plain` before an answer without any."""

    begin: str
    end: str
    plain: str = ""


KNOWN = (
    Markers("<think>", "</think>"),
    Markers("<longcat_think>", "</longcat_think>"),
    Markers("<|think:start|>", "<|think:end|>"),
    # Gemma 4.
    Markers("<|channel>thought", "<channel|>"),
    # Harmony, which gpt-oss speaks.
    Markers(
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
)
_TOKEN = re.compile(r"<[^<>]+>")


def markers_of(tokenizer: Any) -> Markers | None:
    """The markers whose tokens a tokenizer of transformers has; None for one without."""
    vocabulary = tokenizer.get_vocab()
    for markers in KNOWN:
        if all(token in vocabulary for token in _TOKEN.findall("".join(markers))):
            return markers
    return None


class Thoughts:
    """Divides one answer into (thought, said); pieces of both are certain once they are given.

    Thoughts can only come first. White space around the markers belongs to them.
    """

    def __init__(self, markers: Markers | None, *, begun: bool = False) -> None:
        """`begun`: the prompt ends with the first marker already."""
        self._markers = markers or Markers("", "")
        self._held = ""
        self._at: Literal["start", "thought", "gap", "said"] = "said"
        if markers is not None:
            self._at = "thought" if begun else "start"
        self._thinks = False

    def add(self, text: str) -> tuple[str, str]:
        self._held += text
        if self._at == "start":
            self._look_for_the_beginning()
        thought = self._take_thought() if self._at == "thought" else ""
        if self._at == "gap":
            self._held = self._held.lstrip()
            if self._held:
                self._at = "said"
        return thought, self._take(len(self._held)) if self._at == "said" else ""

    def finish(self) -> tuple[str, str]:
        """The text has ended: what was held back."""
        rest = self._take(len(self._held))
        if self._at == "thought":
            return rest.rstrip() if self._thinks else rest.strip(), ""
        return "", rest

    def _take(self, end: int) -> str:
        taken, self._held = self._held[:end], self._held[end:]
        return taken

    def _look_for_the_beginning(self) -> None:
        begin, _, plain = self._markers
        text = self._held.lstrip()
        if text.startswith(begin):
            self._held, self._at = text[len(begin) :], "thought"
        elif plain and text.startswith(plain):
            self._held, self._at = text[len(plain) :], "gap"
        elif not begin.startswith(text) and not plain.startswith(text):
            self._at = "said"

    def _take_thought(self) -> str:
        if not self._thinks:
            self._held = self._held.lstrip()
        end = self._markers.end
        place = self._held.find(end)
        certain = place if place >= 0 else len(self._held) - _begun(end, self._held)
        thought = self._held[:certain].rstrip()
        if place >= 0:
            self._held, self._at = self._held[place + len(end) :], "gap"
        else:
            self._held = self._held[len(thought) :]
        self._thinks = self._thinks or bool(thought)
        return thought


def _begun(marker: str, text: str) -> int:
    """How much of `marker` the text ends with."""
    most = min(len(marker) - 1, len(text))
    return next((n for n in range(most, 0, -1) if text.endswith(marker[:n])), 0)
