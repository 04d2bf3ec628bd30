"""Keeps this node's record telling which models it has files of, and of which revision."""

import logging
import math
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path

import trio

from pxd.cluster.records import MAX_MODELS, HeldModel
from pxd.models.errors import ModelError
from pxd.models.fingerprint import fingerprint
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving")

LOOK_AGAIN_S = 30.0
"""After this, a model that was not here may have been put here."""


class Held:
    """`names()` are the models that matter, `find(name)` the directory of what is here of one, in
    a thread; `publish` puts it in the record."""

    def __init__(
        self,
        names: Callable[[], Iterable[str]],
        find: Callable[[str], Path | None],
        publish: Callable[[tuple[HeldModel, ...]], None],
    ) -> None:
        self._names = names
        self._find = find
        self._publish = publish
        self._found: dict[str, HeldModel] = {}
        self._looked: dict[str, float] = {}
        self._told: tuple[HeldModel, ...] = ()

    def forget(self) -> None:
        """Files have come or gone; the caller notifies `changed`."""
        self._found, self._looked = {}, {}

    async def run(self, changed: Signal) -> None:
        """Look anew at every change, until cancelled."""
        while True:
            event = changed.event
            await self._look(tuple(sorted(set(self._names())))[:MAX_MODELS])
            with trio.move_on_after(LOOK_AGAIN_S):
                await event.wait()

    async def _look(self, names: tuple[str, ...]) -> None:
        # Read again whenever a model comes back: its files may be others by then.
        found = self._found = {n: held for n, held in self._found.items() if n in names}
        looked = self._looked = {n: at for n, at in self._looked.items() if n in names}
        for name in names:
            now = trio.current_time()
            if name not in found and looked.get(name, -math.inf) <= now - LOOK_AGAIN_S:
                looked[name] = now
                mark = await self._mark(name)
                if mark is not None:
                    found[name] = HeldModel(name, mark)
        told = tuple(sorted(found.values()))
        # Where something was forgotten meanwhile, there is another look.
        if told != self._told and found is self._found:
            self._told = told
            self._publish(told)

    async def _mark(self, name: str) -> str | None:
        """Empty where the files cannot be read, None where there are none."""
        try:
            read = partial(self._read, name)
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        except ModelError as error:
            log.info("cannot tell the revision of %s: %s", name, error)
            return ""

    def _read(self, name: str) -> str | None:
        directory = self._find(name)
        return None if directory is None else fingerprint(directory)
