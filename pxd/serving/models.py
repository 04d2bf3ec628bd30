"""Models by name: their description, files and tokenizer, each found once and kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from pxd.executors.protocol import ModelDescription, Progress
from pxd.models import catalog
from pxd.models.chat import ChatTokenizer
from pxd.models.cost import read_cost
from pxd.models.errors import ModelError
from pxd.planning.model import ModelCost

log = logging.getLogger("pxd.serving.models")

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
        self._costs: dict[str, ModelCost] = {}
        self._tokenizers: dict[str, ChatTokenizer] = {}
        self._describing, self._tokenizing = trio.Lock(), trio.Lock()

    async def describe(self, name: str) -> ModelDescription:
        async with self._describing:
            if name not in self._descriptions:
                path = await _in_thread(catalog.fetch_metadata, name)
                description = await self._describe(path)
                # Without it no node could take a request: that is said before anything is loaded.
                await self.tokenizer(name)
                self._descriptions[name] = description
            return self._descriptions[name]

    async def cost(self, name: str) -> ModelCost:
        """What planning needs: sizes as the executor sees them, arithmetic as the files tell it."""
        description = await self.describe(name)
        if name not in self._costs:
            path = await _in_thread(catalog.fetch_metadata, name)
            self._costs[name] = merged_cost(description, await _in_thread(_read_cost, path))
        return self._costs[name]

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


def merged_cost(description: ModelDescription, read: ModelCost | None) -> ModelCost:
    """`read` says how much arithmetic a layer takes, where it knows the model's family."""
    sizes: dict[str, Any] = {
        "layer_bytes": description.layer_bytes,
        "embedding_bytes": description.embedding_bytes,
        "head_bytes": description.head_bytes,
        "tied": description.tied,
        "kv_bytes_per_token": description.kv_bytes_per_token,
        "splits": description.splits,
        "hidden_size": description.hidden_size,
        "context": description.context,
    }
    if read is None or read.layers != description.layers:
        return ModelCost(**sizes)
    return msgspec.structs.replace(read, **sizes)


def _read_cost(path: Path) -> ModelCost | None:
    try:
        return read_cost(path)
    except ModelError as error:
        log.info("planning goes by sizes alone, for %s does not tell more: %s", path, error)
        return None


async def _in_thread(call: Callable[[ArgumentT], ResultT], argument: ArgumentT) -> ResultT:
    """A download that hangs holds back neither the daemon's end nor a newer plan."""
    return await trio.to_thread.run_sync(call, argument, abandon_on_cancel=True)
