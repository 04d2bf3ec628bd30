"""Keeps this node's record telling which models it serves a part of, and which revision of them."""

import logging
from collections.abc import Callable, Iterable
from functools import partial

import trio

from pxd.cluster.records import MAX_MODELS, HeldModel
from pxd.models.errors import ModelError
from pxd.models.fingerprint import fingerprint
from pxd.serving.signal import Signal

log = logging.getLogger("pxd.serving")


class Held:
    """`served()` names the models of this node's ready stages; `publish` puts it in the record."""

    def __init__(
        self,
        served: Callable[[], Iterable[str]],
        publish: Callable[[tuple[HeldModel, ...]], None],
    ) -> None:
        self._served = served
        self._publish = publish
        self._told: tuple[str, ...] = ()

    async def run(self, changed: Signal) -> None:
        """Look anew at every change, until cancelled."""
        while True:
            event = changed.event
            names = tuple(sorted(set(self._served())))[:MAX_MODELS]
            if names != self._told:
                # Read again whenever a model comes back: its files may be others by then.
                self._told = names
                self._publish(tuple([HeldModel(name, await self._mark(name)) for name in names]))
            await event.wait()

    async def _mark(self, name: str) -> str:
        try:
            read = partial(fingerprint, name)
            return await trio.to_thread.run_sync(read, abandon_on_cancel=True)
        except ModelError as error:
            log.info("cannot tell the revision of %s: %s", name, error)
            return ""
