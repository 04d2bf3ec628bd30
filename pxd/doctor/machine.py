"""Is there room on this machine: disk for keys and models, memory for what it offers?"""

import os
from pathlib import Path

import msgspec
import psutil

from pxd import hardware
from pxd.doctor import findings, words
from pxd.doctor.findings import Finding

DISK, MEMORY = "disk", "memory"
GIB = 1 << 30
DATA_NEEDED = 64 << 20
CACHE_WANTED = 10 * GIB
SWAP_NOTED = 0.05
"""Share of the machine's memory."""


class Machine(msgspec.Struct, frozen=True, kw_only=True):
    """Bytes. `own` is what pxd's processes on this machine hold; `offered` is None without a
    daemon. The free figures are None where the disk cannot be asked."""

    data_dir: Path
    data_free: int | None
    cache_dir: Path
    cache_free: int | None
    total: int
    available: int
    swapped: int
    own: int = 0
    offered: int | None = None


def look(data_dir: Path, offered: int | None) -> Machine:
    """Blocks for some milliseconds; for a worker thread."""
    from huggingface_hub import constants

    cache = Path(constants.HF_HUB_CACHE)
    return Machine(
        data_dir=data_dir,
        data_free=_free(data_dir),
        cache_dir=cache,
        cache_free=_free(cache),
        total=hardware.memory_total(),
        available=hardware.memory_available(),
        swapped=int(psutil.swap_memory().used),
        own=_own_memory() if offered is not None else 0,
        offered=offered,
    )


def _free(path: Path) -> int | None:
    """Bytes that may be written at `path`, or where it would be made."""
    for place in (path, *path.parents):
        try:
            return int(psutil.disk_usage(str(place)).free)
        except FileNotFoundError:
            continue
        except OSError:
            return None
    return None


def _own_memory() -> int:
    """Resident bytes of this process and its executors."""
    total = 0
    own = psutil.Process(os.getpid())
    for process in (own, *own.children(recursive=True)):
        try:
            total += process.memory_info().rss
        except psutil.Error:
            continue  # It has just ended.
    return total


def disk(machine: Machine | None) -> list[Finding]:
    if machine is None:
        return [findings.note(DISK, "disk and memory could not be looked at in time")]
    data, cache = machine.data_free, machine.cache_free
    if data is not None and data < DATA_NEEDED:
        text = f"only {words.gib(data)} free for keys and state in {words.path(machine.data_dir)}"
        remedy = "free some space there, or start with another --data-dir"
        return [findings.problem(DISK, text, remedy)]
    if cache is None:
        text = f"cannot tell how much is free in the model cache {words.path(machine.cache_dir)}"
        return [findings.note(DISK, text)]
    text = f"{words.gib(cache)} free in the model cache {words.path(machine.cache_dir)}"
    if cache < CACHE_WANTED:
        remedy = "free some before you fetch a big model, or set HF_HOME to a larger disk"
        return [findings.note(DISK, text, remedy)]
    return [findings.ok(DISK, text)]


def memory(machine: Machine | None) -> list[Finding]:
    if machine is None:
        return []
    room = machine.available + machine.own
    found = []
    if machine.offered is None:
        text = f"{words.gib(machine.available)} of {words.gib(machine.total)} memory available"
        found.append(findings.ok(MEMORY, text))
    elif machine.offered > room:
        text = (
            f"this node offers {words.gib(machine.offered)} to models, but other programs leave "
            f"only {words.gib(room)} of {words.gib(machine.total)}"
        )
        offer = max(0.5, int(room / GIB * 2) / 2)
        remedy = f"close some of them, or restart pxd with `--memory {offer:g}`"
        found.append(findings.warning(MEMORY, text, remedy))
    else:
        text = f"offers {words.gib(machine.offered)} to models; {words.gib(room)} of "
        found.append(findings.ok(MEMORY, f"{text}{words.gib(machine.total)} are there for it"))
    if machine.swapped > SWAP_NOTED * machine.total:
        text = f"{words.gib(machine.swapped)} are swapped out, which makes everything slow"
        remedy = "close programs that need much memory, or offer less with --memory"
        found.append(findings.note(MEMORY, text, remedy))
    return found
