"""Models by name: their description, files and tokenizer, each found once and kept."""

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol, TypeVar

import msgspec
import trio

from pxd.executors.protocol import ModelDescription
from pxd.models import catalog
from pxd.models.chat import ChatTokenizer, check_tokenizer
from pxd.models.cost import read_cost
from pxd.models.errors import ModelError, NoRoom
from pxd.models.fingerprint import fingerprint
from pxd.models.library import Library
from pxd.planning.model import ModelCost
from pxd.serving.weights.run import Progress as FetchProgress

log = logging.getLogger("pxd.serving.models")

ResultT = TypeVar("ResultT")


NOBODY = "no other node says that it has it (`pxd models add` there makes it say so)"


class Describe(Protocol):
    async def __call__(self, path: Path) -> ModelDescription: ...


class Pin(msgspec.Struct, frozen=True):
    """Which files a name stands for: the fingerprint of the plan in force, and the hub's commit;
    empty where that is open."""

    fingerprint: str = ""
    revision: str = ""


class Lending(Protocol):
    """The other members, as far as they lend models."""

    def holders(self, name: str) -> list[str]: ...
    async def metadata(self, name: str, fingerprint: str = "") -> Path: ...
    async def layers(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: FetchProgress
    ) -> Path: ...


class ModelSource:
    """Every method takes a model's name as a person gives it, and raises `ModelError`.

    What is not on this machine comes from other nodes, and what nobody has from the hub. Slow work
    runs in threads and worker processes; concurrent calls for one model do it once.
    """

    def __init__(
        self,
        describe: Describe,
        library: Library,
        lending: Lending,
        pin: Callable[[str], Pin] = lambda _: Pin(),
    ) -> None:
        self._describe = describe
        self._library = library
        self._lending = lending
        self._pin = pin
        self._descriptions: dict[str, ModelDescription] = {}
        self._described: dict[str, tuple[Path, str]] = {}
        self._revisions: dict[str, str] = {}
        self._costs: dict[str, ModelCost] = {}
        self._tokenizers: dict[tuple[str, Pin], ChatTokenizer] = {}
        self._describing, self._tokenizing = trio.Lock(), trio.Lock()
        self._look: _Look | None = None

    @property
    def looking(self) -> str:
        """Which model is being looked at, and how far that is; empty if none is."""
        return f"{self._look.name}: {self._look.words}" if self._look else ""

    async def describe(self, name: str) -> ModelDescription:
        """Also makes sure that there is a tokenizer: without one, nothing can be served."""
        async with self._describing:
            self._look = look = _Look(name)
            try:
                path = await self._metadata(name, look)
                # Once it is not served any more, people put other files in the same place.
                files = path, await _in_thread(fingerprint, path)
                if self._described.get(name) != files:
                    self._descriptions[name] = await self._examine(name, path, look)
                    self._described[name] = files
            finally:
                self._look = None
            return self._descriptions[name]

    async def _examine(self, name: str, path: Path, look: "_Look") -> ModelDescription:
        look("looking at its tokenizer")
        await _in_thread(check_tokenizer, path)
        look("trying out how it can be divided")
        description = await self._describe(path)
        self._revisions[name] = await _in_thread(self._library.revision, name, path)
        self._costs[name] = merged_cost(description, await _in_thread(_read_cost, path))
        return description

    async def cost(self, name: str) -> ModelCost:
        """What planning needs: sizes as the executor sees them, arithmetic as the files tell it."""
        await self.describe(name)
        return self._costs[name]

    def revision(self, name: str) -> str:
        """The hub's commit of what was described; empty if it does not come from there."""
        return self._revisions.get(name, "")

    def holders(self, name: str) -> list[str]:
        """The members that could lend it."""
        return self._lending.holders(name)

    async def tokenizer(self, name: str) -> ChatTokenizer:
        async with self._tokenizing:
            key = name, self._pin(name)
            if key not in self._tokenizers:
                path = await self._metadata(name, _Look(name))
                self._tokenizers[key] = await _in_thread(ChatTokenizer.load, path)
            return self._tokenizers[key]

    async def _metadata(self, name: str, look: "_Look") -> Path:
        """A directory with all but the weights."""
        pin = self._pin(name)
        found = await _in_thread(self._library.find, name, pin.fingerprint, pin.revision)
        if found is not None:
            return found
        lent = NOBODY
        if self._lending.holders(name):
            look("fetching configuration and tokenizer from other nodes")
            try:
                return await self._lending.metadata(name, pin.fingerprint)
            except ModelError as error:
                lent = await self._instead_of(name, error)
        look("fetching configuration and tokenizer")
        try:
            return await _in_thread(catalog.fetch_metadata, name, look.came, pin.revision)
        except ModelError as error:
            raise ModelError(f"{error}; {lent}") from error

    async def _instead_of(self, name: str, error: ModelError) -> str:
        """Raises `error` where, with other nodes failing, the hub and what is here are no help."""
        here = await _in_thread(self._library.elsewhere, name)
        if isinstance(error, NoRoom) or (here is None and not catalog.is_hub_id(name)):
            raise error
        return str(error)

    async def directory(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: FetchProgress
    ) -> Path:
        """A local directory with all that layers [start, end) need, up to the last one for None."""
        find, revision = self._library.find_layers, self._pin(name).revision
        found = await _in_thread(find, name, fingerprint, start, end, revision)
        if found is not None:
            progress(1.0)
            return found
        lent = NOBODY
        if self._lending.holders(name):
            try:
                return await self._lending.layers(name, fingerprint, start, end, progress)
            except ModelError as error:
                lent = await self._instead_of(name, error)
        try:
            return await self._elsewhere(name, start, end, revision, progress)
        except ModelError as error:
            raise ModelError(f"{error}; {lent}") from error

    async def _elsewhere(
        self, name: str, start: int, end: int | None, revision: str, progress: FetchProgress
    ) -> Path:
        """From the hub; what is a directory here is taken even if it is another one than is meant,
        so that the executor says what is wrong with it."""
        token = trio.lowlevel.current_trio_token()
        wanted = True

        def report(done: float) -> None:
            if not wanted:
                raise ModelError(f"{name} is not wanted any more")
            # Also from threads that trio did not start, as the hub's client has some.
            words = "fetching from the hub" if catalog.is_hub_id(name) else ""
            trio.from_thread.run_sync(progress, done, words, trio_token=token)

        try:
            return await _in_thread(catalog.fetch_layers, name, start, end, report, revision)
        finally:
            wanted = False


class _Look:
    """Called with what is being done just now."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.words = "looking for it"

    def __call__(self, words: str) -> None:
        self.words = words

    def came(self, done: float) -> None:
        """From any thread: so much of weights that are one file without an index."""
        self.words = f"fetching its weights, which have no index; {done:.0%} are here"


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


async def _in_thread(call: Callable[..., ResultT], *arguments: object) -> ResultT:
    """A download that hangs holds back neither the daemon's end nor a newer plan."""
    return await trio.to_thread.run_sync(call, *arguments, abandon_on_cancel=True)
