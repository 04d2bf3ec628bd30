"""Models by name: their description, files and tokenizer, each found once and kept."""

from pathlib import Path
from typing import Protocol

import trio

from pxd.executors.protocol import ModelDescription, Progress
from pxd.models import catalog
from pxd.models.chat import ChatTokenizer


class Describe(Protocol):
    async def __call__(self, path: Path) -> ModelDescription: ...


class ModelSource:
    """Every method takes a model's name as a person gives it, and raises `ModelError`.

    Slow work runs in threads and worker processes; concurrent calls for one model do it once.
    """

    def __init__(self, describe: Describe) -> None:
        self._describe = describe
        self._descriptions: dict[str, ModelDescription] = {}
        self._tokenizers: dict[str, ChatTokenizer] = {}
        self._lock = trio.Lock()

    async def describe(self, name: str) -> ModelDescription:
        async with self._lock:
            if name not in self._descriptions:
                path = await trio.to_thread.run_sync(catalog.fetch_metadata, name)
                self._descriptions[name] = await self._describe(path)
            return self._descriptions[name]

    async def tokenizer(self, name: str) -> ChatTokenizer:
        async with self._lock:
            if name not in self._tokenizers:
                path = await trio.to_thread.run_sync(catalog.fetch_metadata, name)
                self._tokenizers[name] = await trio.to_thread.run_sync(ChatTokenizer.load, path)
            return self._tokenizers[name]

    async def directory(self, name: str, start: int, end: int, progress: Progress) -> Path:
        """A local directory with at least the files that hold layers [start, end)."""

        def fetch() -> Path:
            return catalog.fetch_layers(
                name, start, end, lambda done: trio.from_thread.run_sync(progress, done)
            )

        return await trio.to_thread.run_sync(fetch)
