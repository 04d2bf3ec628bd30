"""Engines for tests that make many: a process that has loaded a stage is used again for the same.

SGLang takes 15 seconds of CPU to load anything, and only once in a process. A new session frees all
that the last test has left.
"""

import atexit
import itertools
from collections import OrderedDict

import msgspec

from pxd.executors.protocol import LoadSpec, MemoryReport, Progress, StageInfo, StepOutput
from pxd.wire import Buffer, Coding, Step, Tensor
from tests.sglang.remote import RemoteEngine

MOST_PROCESSES = 5
_loaded: "OrderedDict[LoadSpec, tuple[RemoteEngine, StageInfo]]" = OrderedDict()
_lives = itertools.count(1)


@atexit.register
def _close_all() -> None:
    for engine, _ in _loaded.values():
        engine.close()


class SharedEngine:
    """See `pxd.executors.protocol.Engine`."""

    def __init__(self) -> None:
        self._engine: RemoteEngine | None = None
        self._sessions, self._session = next(_lives) << 20, 0

    def load(self, spec: LoadSpec, progress: Progress) -> StageInfo:
        if self._engine is not None:
            return self._engine.load(spec, progress)
        if spec in _loaded and _loaded[spec][0].process.poll() is not None:
            _loaded.pop(spec)[0].close()
        if spec not in _loaded:
            _loaded[spec] = _open(spec, progress)
        else:
            progress(1.0)
        _loaded.move_to_end(spec)
        self._engine, info = _loaded[spec]
        self.send_as(None)
        self.release(())
        while len(_loaded) > MOST_PROCESSES:
            _loaded.popitem(last=False)[1][0].close()
        return info

    def step(self, step: Step, body: Buffer) -> StepOutput:
        self._session = step.session
        step = msgspec.structs.replace(step, session=self._sessions + step.session)
        return self._there.step(step, body)

    def release(self, requests: tuple[int, ...]) -> None:
        """In the session of the last step; in the first, all that an earlier test had is freed."""
        empty = Step(
            pipeline="p",
            session=self._session,
            step=0,
            rows=(),
            tensor=Tensor("i32", (0,)),
            releases=requests,
        )
        self.step(empty, b"")

    def send_as(self, coding: Coding | None) -> None:
        self._there.send_as(coding)

    def memory(self) -> MemoryReport:
        return self._there.memory()

    @property
    def _there(self) -> RemoteEngine:
        if self._engine is None:
            # Nothing is loaded, which is for the process to say.
            self._engine = RemoteEngine()
            atexit.register(self._engine.close)
        return self._engine


def _open(spec: LoadSpec, progress: Progress) -> tuple[RemoteEngine, StageInfo]:
    engine = RemoteEngine()
    try:
        return engine, engine.load(spec, progress)
    except BaseException:
        engine.close()
        raise
