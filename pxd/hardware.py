"""What this machine is, as far as that can be told without a tensor library.

How fast it is must be measured by an executor in a process of its own; this room only remembers
the result.
"""

import logging
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import psutil

from pxd.identity import write_private

log = logging.getLogger("pxd.hardware")

MEMORY_SHARE = 0.75
"""Share of a machine's memory that its node offers to models unless told otherwise."""
MIN_MEMORY_SHARE = 0.25
"""Offered even when other programs leave less free: what they use now they may give back."""

_GIB = 1 << 30
_CGROUP_ROOT = Path("/sys/fs/cgroup")
_PROC = Path("/proc")

FiguresT = TypeVar("FiguresT")


class _CacheFile(msgspec.Struct, frozen=True):
    key: str
    figures: msgspec.Raw


def memory_total() -> int:
    """Bytes of memory this process may use: the machine's, or a cgroup limit below that."""
    return min([psutil.virtual_memory().total, *_cgroup_limits(_CGROUP_ROOT, _PROC)])


def memory_available() -> int:
    """Bytes that could be allocated now without swapping."""
    available: int = psutil.virtual_memory().available
    room = [limit - used for limit, used in _cgroup_usage(_CGROUP_ROOT, _PROC)]
    return max(0, min([available, *room]))
