"""What the doctor says: one finding per thing looked at, in plain words, with the remedy."""

from typing import Literal

import msgspec

Level = Literal["ok", "note", "warning", "problem"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """`check` names what was looked at, in one word for programs. `remedy` says what to do, and
    `details` are further lines of figures; both may be empty."""

    check: str
    level: Level
    text: str
    remedy: str = ""
    details: tuple[str, ...] = ()


class Report(msgspec.Struct, frozen=True, kw_only=True):
    """`healthy`: nothing found is a problem. `seconds` is how long the examination took."""

    node: str
    version: str
    daemon: bool
    healthy: bool
    seconds: float
    findings: tuple[Finding, ...]


def ok(check: str, text: str, *details: str) -> Finding:
    return Finding(check=check, level="ok", text=text, details=details)


def note(check: str, text: str, remedy: str = "", details: tuple[str, ...] = ()) -> Finding:
    """Worth knowing, nothing to worry about."""
    return Finding(check=check, level="note", text=text, remedy=remedy, details=details)


def warning(check: str, text: str, remedy: str, details: tuple[str, ...] = ()) -> Finding:
    """Works, but not as well as it could."""
    return Finding(check=check, level="warning", text=text, remedy=remedy, details=details)


def problem(check: str, text: str, remedy: str, details: tuple[str, ...] = ()) -> Finding:
    """Something that the node is for does not work."""
    return Finding(check=check, level="problem", text=text, remedy=remedy, details=details)
