"""Models that people want to have on this node, whatever the cluster serves."""

import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import msgspec
import trio

from pxd.cluster.records import MAX_MODELS
from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.errors import ModelError
from pxd.models.library import Library
from pxd.serving.choice import ChoiceError, called
from pxd.serving.quantizing import Quantize, Quantizing, Recipe, Source
from pxd.serving.signal import Signal
from pxd.serving.status import AddedView

log = logging.getLogger("pxd.serving.added")

RETRY_S = 60.0
QUANTIZE_AGAIN_S = 600.0
"""After a failure of what takes all that the machine can do."""

MAX_ADDED = MAX_MODELS - 8
"""The record has to have room for those that are served, too."""


class Models(Source, Protocol):
    async def describe(self, name: str) -> object: ...


class Removed(msgspec.Struct, frozen=True):
    """What became of a model's files here. `left` is where some stay that pxd did not bring."""

    model: str
    deleted: bool
    left: str = ""


class Added:
    """`names` are those of the last life, `recipes` those of them that are made here. `save` writes
    fields of `identity.State`; `in_use()` are the models of which this node serves layers.
    `changed` is told when files have come or gone."""

    def __init__(
        self,
        names: Iterable[str],
        models: Models,
        library: Library,
        save: Callable[..., Awaitable[None]],
        in_use: Callable[[], Iterable[str]],
        changed: Callable[[], None],
        *,
        quantize: Quantize | None,
        recipes: Mapping[str, tuple[str, int]] = MappingProxyType({}),
    ) -> None:
        self._models = models
        self._library = library
        self._save = save
        self._in_use = in_use
        self._changed = changed
        self._quantizing = Quantizing(models, library, quantize)
        self._recipes = {name: Recipe(*recipe) for name, recipe in recipes.items()}
        self._views = {name: AddedView(name=name, state="fetching") for name in names}
        self._fetching: dict[str, tuple[trio.CancelScope, trio.Event]] = {}
        self._asked = Signal()
        self._deciding = trio.Lock()
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
                self._start(name)
            task_status.started()
            await trio.sleep_forever()

    async def add(self, name: str, bits: int | None = None) -> AddedView:
        """Begin to have all of a model here, or a copy of it that is quantised to so many `bits`.
        Raises `ChoiceError`, also if there is no such."""
        name = called(name, self.names) or name
        recipe = Recipe(name, bits) if bits is not None else None
        try:
            await self._models.describe(name)
            if recipe is not None:
                await self._quantizing.check(recipe)
        except (ModelError, ExecutorError, ExecutorDied, OSError) as error:
            raise ChoiceError("bad_model", f"{name} cannot be had: {error}") from error
        async with self._deciding:
            return await self._begin(recipe.name if recipe else name, recipe)

    async def _begin(self, name: str, recipe: Recipe | None) -> AddedView:
        if name not in self._views:
            if len(self._views) >= MAX_ADDED:
                message = (
                    f"a node keeps {MAX_ADDED} models at most; `pxd models remove` one of them"
                )
                raise ChoiceError("full", message)
            recipes = self._recipes | ({name: recipe} if recipe else {})
            await self._remember({*self.names, name}, recipes)
            self._views[name] = AddedView(name=name, state="fetching")
            self._changed()
        elif self._views[name].state != "fetching":
            # Also of what was here: people delete files.
            self._show(name, state="fetching", reason="")
            self._asked.notify()
        self._start(name)
        return self._views[name]

    async def remove(self, name: str) -> Removed:
        """Have it here no more. Raises `ChoiceError`."""
        async with self._deciding:
            return await self._remove(name)

    async def _remove(self, name: str) -> Removed:
        kept = await trio.to_thread.run_sync(self._library.store.names)
        full = called(name, (*self.names, *kept))
        if full is None:
            listed = ", ".join(dict.fromkeys((*self.names, *kept))) or "none"
            message = f"this node did not fetch or add {name!r}; it did {listed}"
            raise ChoiceError("unknown_model", message)
        if full in self._in_use():
            message = f"this node serves layers of {full}; `pxd models stop {full}` first"
            raise ChoiceError("in_use", message)
        recipes = {name: recipe for name, recipe in self._recipes.items() if name != full}
        await self._remember({*self.names} - {full}, recipes)
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

    async def _remember(self, names: set[str], recipes: dict[str, Recipe]) -> None:
        try:
            await self._save(added=tuple(sorted(names)), quantized=recipes)
        except OSError as error:
            raise ChoiceError("storage", f"this node cannot write that down: {error}") from error
        self._recipes = recipes

    def _start(self, name: str) -> None:
        if name not in self._fetching and self._nursery:
            self._fetching[name] = trio.CancelScope(), trio.Event()
            self._nursery.start_soon(self._have, name)

    async def _have(self, name: str) -> None:
        scope, ended = self._fetching[name]
        with scope:
            while pause := await self._fetch(name):
                event = self._asked.event
                with trio.move_on_after(pause):
                    await event.wait()
        del self._fetching[name]
        ended.set()

    async def _fetch(self, name: str) -> float:
        """Returns after how many seconds to try again; 0 if all is here."""

        def progress(done: float, words: str = "") -> None:
            self._show(name, state="fetching", progress=done, reason=words)

        try:
            if recipe := self._recipes.get(name):
                await self._quantizing.have(recipe, progress)
            else:
                await self._models.directory(name, "", 0, None, progress)
        except (ModelError, OSError) as error:
            log.error("%s cannot be fetched: %s", name, error)
            self._show(name, state="failed", reason=str(error))
            return RETRY_S
        except (ExecutorError, ExecutorDied) as error:
            log.error("%s cannot be made: %s", name, error)
            self._show(name, state="failed", reason=str(error))
            return QUANTIZE_AGAIN_S
        self._show(name, state="here", progress=1.0, reason="")
        self._changed()
        return 0.0

    def _show(self, name: str, **changes: object) -> None:
        if name in self._views:
            self._views[name] = msgspec.structs.replace(self._views[name], **changes)
