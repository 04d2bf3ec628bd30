"""Puts names, lists and figures into sentences."""

from collections.abc import Iterable, Sequence
from pathlib import Path

SHOWN = 4


def listed(items: Iterable[str], most: int = SHOWN) -> str:
    """ "a", "a and b", "a, b and c", or "a, b, c and 7 more"."""
    names = list(items)
    if len(names) > most:
        names = [*names[: most - 1], f"{len(names) - most + 1} more"]
    if len(names) < 2:
        return "".join(names)
    return f"{', '.join(names[:-1])} and {names[-1]}"


def plural(count: int, word: str) -> str:
    return f"{count} {word}" if count == 1 else f"{count} {word}s"


def ports(numbers: Sequence[int]) -> str:
    """ "port 8471" or "ports 8471 and 8472"."""
    return f"port{'s' * (len(numbers) > 1)} {listed(str(number) for number in numbers)}"


def gib(size: float) -> str:
    """Bytes in GiB, or MiB below one."""
    if size < 1 << 30:
        return f"{size / (1 << 20):.0f} MiB"
    return f"{size / (1 << 30):.1f} GiB"


def path(where: Path) -> str:
    """With ~ for the home directory."""
    try:
        return str("~" / where.relative_to(Path.home()))
    except (ValueError, RuntimeError):
        return str(where)


def seconds(span: float) -> str:
    """Roughly how long: "3 ms", "0.4 s", "12 s", "3 min", "5 h", "2 days"."""
    if span < 0.1:
        return f"{max(1.0, span * 1000):.0f} ms"
    if span < 10:
        return f"{span:.1f} s"
    if span < 90:
        return f"{span:.0f} s"
    if span < 90 * 60:
        return f"{span / 60:.0f} min"
    if span < 48 * 3600:
        return f"{span / 3600:.0f} h"
    return f"{span / 86400:.0f} days"
