"""Quantised copies of models, made on this node."""

import logging
import shutil
from collections.abc import Awaitable, Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple, Protocol

import trio

from pxd.models.errors import ModelError
from pxd.models.kept import disk_error
from pxd.models.library import Library
from pxd.models.quantized import check_unquantized, quantized_name
from pxd.serving.weights.run import Progress

log = logging.getLogger("pxd.serving.quantizing")

Quantize = Callable[[Path, Path, int, Callable[[float], None]], Awaitable[None]]
"""Writes a copy of the model in one directory into another one, with so many bits."""


class Source(Protocol):
    async def directory(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: Progress
    ) -> Path: ...
    def holders(self, name: str) -> list[str]: ...


class Recipe(NamedTuple):
    """`source` is the name of the model that the copy is made of."""

    source: str
    bits: int

    @property
    def name(self) -> str:
        return quantized_name(self.source, self.bits)


class Quantizing:
    """Makes one copy at a time: each takes all that the machine can do. `quantize` is None on nodes
    that could not serve a copy."""

    def __init__(self, models: Source, library: Library, quantize: Quantize | None) -> None:
        self._models = models
        self._library = library
        self._quantize = quantize
        self._turn = trio.Lock()

    async def check(self, recipe: Recipe) -> None:
        """Raises `ModelError` if there can be no such copy of a model that was described."""
        self._quantizer()
        await trio.to_thread.run_sync(self._check, recipe)

    def _quantizer(self) -> Quantize:
        if self._quantize is None:
            raise ModelError(
                "this node's executor cannot serve what MLX quantises: `pxd start --executor mlx`, "
                "or use another node"
            )
        return self._quantize

    def _check(self, recipe: Recipe) -> None:
        directory = self._library.find(recipe.source)
        if directory is not None:
            check_unquantized(recipe.source, directory)
        if other := self._library.elsewhere(recipe.name):
            raise ModelError(f"there is another {recipe.name} on this node already: {other}")

    async def have(self, recipe: Recipe, progress: Progress) -> None:
        """Returns when the copy is among the models that are kept here, whole. Raises `ModelError`,
        `ExecutorError` and `ExecutorDied`; nothing is left of half a copy then."""
        if await self._is_here(recipe.name) or await self._is_lent(recipe.name, progress):
            return
        quantize = self._quantizer()
        source = await self._models.directory(recipe.source, "", 0, None, progress)
        await trio.to_thread.run_sync(check_unquantized, recipe.source, source)
        words = f"quantising to {recipe.bits} bits"
        progress(0.0, words)
        # Threads run to their end, whoever is cancelled: files are written and deleted in them.
        async with self._turn:
            place = await trio.to_thread.run_sync(self._library.store.workplace, recipe.name)
            try:
                await quantize(source, place, recipe.bits, lambda done: progress(done, words))
                await trio.to_thread.run_sync(self._library.store.adopt, place, recipe.name)
            except OSError as error:
                raise disk_error(recipe.name, error) from error
            finally:
                with trio.CancelScope(shield=True):
                    await trio.to_thread.run_sync(partial(shutil.rmtree, place, ignore_errors=True))
        log.info("%s is made", recipe.name)

    async def _is_here(self, name: str) -> bool:
        find = self._library.find_layers
        return await trio.to_thread.run_sync(find, name, "", 0, None) is not None

    async def _is_lent(self, name: str, progress: Progress) -> bool:
        """Two nodes that quantise the same do not always come to the same bytes."""
        if not self._models.holders(name):
            return False
        try:
            await self._models.directory(name, "", 0, None, progress)
        except ModelError as error:
            log.warning("%s is made here, for nobody gives all of it: %s", name, error)
            return False
        return True
