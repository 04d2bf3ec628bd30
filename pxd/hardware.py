"""What this machine is, as far as that can be told without a tensor library.

How fast it is must be measured by an executor in a process of its own; this room only remembers
the result.
"""

import logging
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

import msgspec
import psutil

from pxd import __version__
from pxd.identity import write_private
from pxd.wire import DECODE_ERRORS

log = logging.getLogger("pxd.hardware")

MEMORY_SHARE = 0.75
"""Share of a machine's memory that its node offers to models unless told otherwise."""
MIN_MEMORY_SHARE = 0.25
"""What is offered even if other programs leave less: they may give it back."""

_GIB = 1 << 30
_SYSCTL_TIMEOUT = 5.0
_CPU_BRAND, _WIRED_LIMIT = "machdep.cpu.brand_string", "iogpu.wired_limit_mb"

FiguresT = TypeVar("FiguresT")


def memory_total() -> int:
    """Bytes of memory this process may use: the machine's, or the limit of its cgroup."""
    groups = [limit for limit, _ in cgroup_memory()]
    return min((int(psutil.virtual_memory().total), *groups))


def memory_available() -> int:
    """Bytes that could be allocated now without swapping or breaking a cgroup's limit."""
    rooms = [limit - used for limit, used in cgroup_memory()]
    return max(0, min((int(psutil.virtual_memory().available), *rooms)))


def memory_offer(total: int, available: int, cap_gib: float | None = None) -> int:
    """Bytes that a node offers to models, given its device's memory.

    By default `MEMORY_SHARE` of the total, or less where other programs hold more than the rest,
    down to `MIN_MEMORY_SHARE`. `cap_gib`, from `--memory`, says it outright, up to the total.
    """
    if cap_gib is not None:
        return max(0, min(int(cap_gib * _GIB), total))
    return int(min(MEMORY_SHARE * total, max(MIN_MEMORY_SHARE * total, available)))


def device_name() -> str:
    """The processor by its trade name, such as "Apple M3 Max"; never empty."""
    on_mac = sys.platform == "darwin"
    name = _sysctl(_CPU_BRAND) if on_mac else _cpuinfo_name(Path("/proc/cpuinfo"))
    return name or platform.processor() or platform.machine() or "unknown processor"


def machine_key() -> str:
    """Names everything that a measurement depends on; another key means: measure again."""
    return (
        f"pxd {__version__}, {device_name()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {memory_total()} bytes{_wired_limit()}"
    )


def load_cached(path: Path, key: str, kind: type[FiguresT]) -> FiguresT | None:
    """Figures stored under `key`, decoded as `kind`; None if they have to be measured (again)."""
    try:
        cached = msgspec.json.decode(path.read_bytes(), type=_Cache)
        if cached.key == key:
            return msgspec.json.decode(cached.figures, type=kind)
    except FileNotFoundError:
        return None
    except (OSError, *DECODE_ERRORS) as error:
        log.warning("cannot read %s (%s); measuring this machine again", path, error)
    return None


def store(path: Path, key: str, figures: msgspec.Struct) -> None:
    """Remember figures for `load_cached`, replacing all others. Raises OSError."""
    content = _Cache(key=key, figures=msgspec.Raw(msgspec.json.encode(figures)))
    write_private(path, msgspec.json.format(msgspec.json.encode(content)))


class _Cache(msgspec.Struct, frozen=True):
    key: str
    figures: msgspec.Raw


def cgroup_memory(
    root: Path = Path("/sys/fs/cgroup"), membership: Path = Path("/proc/self/cgroup")
) -> list[tuple[int, int]]:
    """(limit, used) in bytes of every memory cgroup around this process, version 1 or 2.

    Page cache that the kernel would drop first does not count as used. Empty where there are no
    cgroups; a group without a limit shows a huge one or is left out.
    """
    return [
        (limit, max(0, used - _cache_bytes(group)))
        for group in _memory_groups(root, membership)
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        )
        if (limit := _number(group / limit_name)) is not None
        and (used := _number(group / used_name)) is not None
    ]


def _memory_groups(root: Path, membership: Path) -> Iterator[Path]:
    for line in _read(membership).splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers not in ("", "memory") and "memory" not in controllers.split(","):
            continue
        top = root / "memory" if controllers else root
        group = top / path.lstrip("/")
        # In a container the path may lead out of what is mounted; the limits are then at the top.
        while group != top and ".." not in group.parts and group.is_relative_to(top):
            yield group
            group = group.parent
        yield top


def _number(path: Path) -> int | None:
    text = _read(path).strip()
    return int(text) if text.isdecimal() else None


def _cache_bytes(group: Path) -> int:
    figures = dict(
        line.split(" ", 1) for line in _read(group / "memory.stat").splitlines() if " " in line
    )
    return int(figures.get("total_inactive_file", figures.get("inactive_file", 0)))


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except OSError:
        return ""


def _cpuinfo_name(path: Path) -> str:
    for line in _read(path).splitlines():
        label, _, value = line.partition(":")
        if label.strip() in ("model name", "Model"):
            return value.strip()
    return ""


def _wired_limit() -> str:
    """What a person has set, of which the limit that a device tells follows."""
    limit = _sysctl(_WIRED_LIMIT) if sys.platform == "darwin" else ""
    return f", wired limit {limit} MB" if limit else ""


def _sysctl(name: str) -> str:
    try:
        result = subprocess.run(
            ["/usr/sbin/sysctl", "-n", name],
            capture_output=True,
            text=True,
            timeout=_SYSCTL_TIMEOUT,
            check=True,
        )
    except (OSError, subprocess.SubprocessError) as error:
        log.info("sysctl does not tell %s: %s", name, error)
        return ""
    return result.stdout.strip()
