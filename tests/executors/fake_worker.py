"""A worker without a model, for tests of the process around it: `python fake_worker.py FD`.

Its engine does what the pipeline name of a step says: ``echo``, ``sleep:SECONDS``, ``exit:CODE``,
``reject``, ``starve``, ``forward``; ``copy`` reports a copy, ``coding`` forwards in the coding said
last.
"""

import os
import sys
import threading
import time
from pathlib import Path

from pxd.cluster.records import Device
from pxd.executors.protocol import (
    Engine,
    ExecutorError,
    LoadSpec,
    MemoryReport,
    ModelDescription,
    Progress,
    StageInfo,
    StepOutput,
    StepRejected,
)
from pxd.executors.scratch import own_directory
from pxd.executors.slots import Report
from pxd.executors.worker import serve
from pxd.wire import Buffer, Coding, Copied, Step, Tensor


class FakeEngine:
    def __init__(self, report: Report) -> None:
        self.report = report
        self.coding: Coding | None = None

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        if spec.path == "/refused":
            raise ExecutorError("no such model")
        if spec.path == "/crash":
            raise IndexError("something unforeseen")
        if spec.path == "/litter":
            (own_directory() / "view").mkdir()
            progress(0.1)
            time.sleep(600)
        if spec.path == "/slow":
            progress(0.1)
            time.sleep(600)
        for done in (0.25, 0.5, 2.0):
            progress(done)
        return StageInfo(
            layers=spec.end - spec.start, hidden_size=4, weight_bytes=8, kv_tokens=spec.kv_bytes
        )

    def step(self, step: Step, body: Buffer) -> StepOutput:
        action, _, argument = step.pipeline.partition(":")
        if action == "sleep":
            time.sleep(float(argument))
        elif action == "exit":
            print("about to leave", file=sys.stderr, flush=True)
            os._exit(int(argument))
        elif action == "reject":
            raise StepRejected("unknown-request", "never heard of it", (7,))
        elif action == "starve":
            raise StepRejected("out-of-memory", "no room", tuple(row.request for row in step.rows))
        elif action == "forward":
            return step.tensor, bytes(body)
        elif action == "coding":
            return Tensor("f32", (0, 0), self.coding), b""
        elif action == "copy" and step.store:
            copied = Copied(pipeline=step.pipeline, session=step.session, event=step.store.event)
            # Its own thread, and this step's reply after it or before it.
            threading.Thread(target=self.report, args=(copied,)).start()
        return tuple(100 + row.request for row in step.rows if row.draws)

    def send_as(self, coding: Coding | None) -> None:
        self.coding = coding

    def memory(self) -> MemoryReport:
        return MemoryReport(active=0, resident=1, requests=0)


class FakeBackend:
    def engine(self, report: Report) -> Engine:
        return FakeEngine(report)

    def describe(self, path: Path) -> ModelDescription:
        raise ExecutorError(f"nothing at {path}")

    def measure(self) -> Device:
        return Device(kind="cpu", name="fake")


if __name__ == "__main__":
    sys.exit(serve(int(sys.argv[1]), FakeBackend))
