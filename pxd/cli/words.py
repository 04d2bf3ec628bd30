"""Puts numbers and strangers' strings into words fit for a terminal."""

import re

from pxd.serving.status import Figures

_DEVICE_NOISE = re.compile(r"\((?:R|TM)\)| \d+-Core\b| Processor\b| CPU\b| @ [\d.]+ ?GHz")
_BIDIRECTIONAL = {chr(code) for code in (*range(0x202A, 0x202F), *range(0x2066, 0x206A))}


def clean(text: str) -> str:
    """One line without anything that steers a terminal: names come from other machines."""
    return "".join(c if c.isprintable() and c not in _BIDIRECTIONAL else "\ufffd" for c in text)


def clean_answer(text: str) -> str:
    """A model's words: like `clean`, with line breaks, tabs and joined emoji left alone."""
    return "".join(
        "\ufffd" if (ord(c) < 32 and c not in "\n\t") or 0x7F <= ord(c) < 0xA0 else c for c in text
    )


def duration(seconds: float) -> str:
    """Roughly how long, for example "12 s", "3 min", "5 h", "2 days"."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    if seconds < 48 * 3600:
        return f"{seconds / 3600:.0f} h"
    return f"{seconds / 86400:.0f} days"


def device(name: str) -> str:
    """A device's name without what its maker adds to every name."""
    return _DEVICE_NOISE.sub("", clean(name))


def memory(gib: float) -> str:
    if gib < 1:
        return f"{gib * 1024:.0f} MiB"
    return f"{gib:.1f} GiB" if gib < 100 else f"{gib:.0f} GiB"


def layers(start: int, end: int) -> str:
    return f"[{start},{end})"


def speed(figures: Figures) -> str:
    """Such as "12.3 ms/token, 0.4 s to the first after 1,024, 81 tokens/s"."""
    words = [f"{figures.token_ms:.3g} ms/token"]
    if figures.ttft_ms is not None:
        words.append(f"{figures.ttft_ms / 1000:.3g} s to the first after {figures.prompt_tokens:,}")
    if figures.tokens_per_s is not None:
        words.append(f"{figures.tokens_per_s:.3g} tokens/s")
    return ", ".join(words)
