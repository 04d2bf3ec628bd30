"""Models by name: their description, files and tokenizer, each found once and kept."""

from collections.abc import Callable
from pathlib import Path
from typing import Protocol, TypeVar

import trio

from pxd.executors.protocol import ModelDescription, Progress
from pxd.models import catalog
from pxd.models.chat import ChatTokenizer

ArgumentT = TypeVar("ArgumentT")
ResultT = TypeVar("ResultT")


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
        self._describing, self._tokenizing = trio.Lock(), trio.Lock()

    async def describe(self, name: str) -> ModelDescription:
        async with self._describing:
            if name not in self._descriptions:
                path = await _in_thread(catalog.fetch_metadata, name)
                self._descriptions[name] = await self._describe(path)
            return self._descriptions[name]

    async def tokenizer(self, name: str) -> ChatTokenizer:
        async with self._tokenizing:
            if name not in self._tokenizers:
                path = await _in_thread(catalog.fetch_metadata, name)
                self._tokenizers[name] = await _in_thread(ChatTokenizer.load, path)
            return self._tokenizers[name]

    async def directory(self, name: str, start: int, end: int, progress: Progress) -> Path:
        """A local directory with at least the files that hold layers [start, end)."""

        token = trio.lowlevel.current_trio_token()

        def report(done: float) -> None:
            # Also from threads that trio did not start, as the hub's client has some.
            trio.from_thread.run_sync(progress, done, trio_token=token)

        return await trio.to_thread.run_sync(catalog.fetch_layers, name, start, end, report)


async def _in_thread(call: Callable[[ArgumentT], ResultT], argument: ArgumentT) -> ResultT:
    """A download that hangs holds back neither the daemon's end nor a newer plan."""
    return await trio.to_thread.run_sync(call, argument, abandon_on_cancel=True)
