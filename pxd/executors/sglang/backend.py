"""What the SGLang executor offers to the worker."""

import logging
import sys
from pathlib import Path

from pxd.cluster.records import Device
from pxd.executors.protocol import Engine, ModelDescription
from pxd.executors.sglang.pinned import check_version
from pxd.executors.slots import Report

# Imported where they are used: SGLang takes half a minute, and a worker needs but one of these.


class SglangBackend:
    def __init__(self) -> None:
        """Raises ImportError where SGLang is not installed in the release that is needed."""
        if sys.platform != "linux":
            raise ImportError("SGLang runs on Linux only")
        check_version()

    def engine(self, _report: Report) -> Engine:
        from pxd.executors.paged import PagedEngine
        from pxd.executors.sglang.loader import load

        return PagedEngine(load, logging.getLogger("pxd.executors.sglang"))

    def describe(self, path: Path) -> ModelDescription:
        from pxd.executors.sglang.describe import describe

        return describe(path)

    def measure(self) -> Device:
        from pxd.executors.sglang.measure import measure

        return measure()
