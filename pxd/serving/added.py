"""Models that people want to have on this node, whatever the cluster serves."""

import logging
from collections.abc import Awaitable, Callable, Iterable
from pathlib import Path
from typing import Protocol

import msgspec
import trio

from pxd.cluster.records import MAX_MODELS
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.errors import ModelError
from pxd.models.library import Library
from pxd.serving.choice import ChoiceError, called
from pxd.serving.status import AddedView
from pxd.serving.weights.run import Progress

log = logging.getLogger("pxd.serving.added")

RETRY_S = 60.0
MAX_ADDED = MAX_MODELS - 8
"""The record has to have room for those that are served, too."""


class Source(Protocol):
    async def describe(self, name: str) -> object: ...
    async def directory(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: Progress
    ) -> Path: ...


class Removed(msgspec.Struct, frozen=True):
    """What became of a model's files here. `left` is where some stay that pxd did not bring."""

    model: str
    deleted: bool
    left: str = ""


class Added:
    """`names` are those of the last life. `save` writes fields of `identity.State`; `in_use()` are
    the models of which this node serves layers. `changed` is told when files have come or gone."""

    def __init__(
        self,
        names: Iterable[str],
        models: Source,
        library: Library,
        save: Callable[..., Awaitable[None]],
        in_use: Callable[[], Iterable[str]],
        changed: Callable[[], None],
    ) -> None:
        self._models = models
        self._library = library
        self._save = save
        self._in_use = in_use
        self._changed = changed
        self._views = {name: AddedView(name=name, state="fetching") for name in names}
        self._fetching: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._nursery: trio.Nursery | None = None

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(self._views)

    def views(self) -> list[AddedView]:
        return [self._views[name] for name in sorted(self._views)]

    async def run(self, *, task_status: "trio.TaskStatus[None]" = trio.TASK_STATUS_IGNORED) -> None:
        """Fetch what is not here, until cancelled."""
        async with trio.open_nursery() as self._nursery:
            for name in self.names:
                self._nursery.start_soon(self._have, name)
            task_status.started()
            await trio.sleep_forever()

    async def add(self, name: str) -> AddedView:
        """Begin to have all of a model here. Raises `ChoiceError`, also if there is no such."""
        name = called(name, self.names) or name
        try:
            await self._models.describe(name)
        except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
            raise ChoiceError("bad_model", f"{name} cannot be had: {error}") from error
        if name not in self._views:
            if len(self._views) >= MAX_ADDED:
                message = (
                    f"a node keeps {MAX_ADDED} models at most; `pxd models remove` one of them"
                )
                raise ChoiceError("full", message)
            await self._remember({*self.names, name})
            self._views[name] = AddedView(name=name, state="fetching")
            self._changed()
        if self._views[name].state != "here" and name not in self._fetching and self._nursery:
            self._nursery.start_soon(self._have, name)
        return self._views[name]

    async def remove(self, name: str) -> Removed:
        """Have it here no more. Raises `ChoiceError`."""
        kept = await trio.to_thread.run_sync(self._library.store.names)
        full = called(name, (*self.names, *kept))
        if full is None:
            listed = ", ".join(dict.fromkeys((*self.names, *kept))) or "none"
            message = f"this node did not fetch or add {name!r}; it did {listed}"
            raise ChoiceError("unknown_model", message)
        if full in self._in_use():
            message = f"this node serves layers of {full}; `pxd models stop {full}` first"
            raise ChoiceError("in_use", message)
        await self._remember({*self.names} - {full})
        self._views.pop(full, None)
        if full in self._fetching:
            scope, ended = self._fetching[full]
            scope.cancel()
            await ended.wait()
        try:
            count = await trio.to_thread.run_sync(self._library.store.remove, full)
        except OSError as error:
            raise ChoiceError("storage", f"its files cannot be deleted: {error}") from error
        left = await trio.to_thread.run_sync(self._library.elsewhere, full)
        self._changed()
        return Removed(full, count > 0, str(left or ""))

    async def _remember(self, names: set[str]) -> None:
        try:
            await self._save(added=tuple(sorted(names)))
        except OSError as error:
            raise ChoiceError("storage", f"this node cannot write that down: {error}") from error

    async def _have(self, name: str) -> None:
        with trio.CancelScope() as scope:
            self._fetching[name] = scope, trio.Event()
            while not await self._fetched(name):
                await trio.sleep(RETRY_S)
        _, ended = self._fetching.pop(name)
        ended.set()

    async def _fetched(self, name: str) -> bool:
        def progress(done: float, words: str = "") -> None:
            self._show(name, state="fetching", progress=done, reason=words)

        try:
            await self._models.directory(name, "", 0, None, progress)
        except (ModelError, OSError) as error:
            log.error("%s cannot be fetched: %s", name, error)
            self._show(name, state="failed", reason=str(error))
            return False
        self._show(name, state="here", progress=1.0, reason="")
        self._changed()
        return True

    def _show(self, name: str, **changes: object) -> None:
        if name in self._views:
            self._views[name] = msgspec.structs.replace(self._views[name], **changes)
