"""Where a model's files are taken from: what is here, other nodes, the hub."""

import threading
from pathlib import Path
from typing import Any

import pytest
import trio

from pxd.executors.protocol import ModelDescription
from pxd.models import catalog
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError, NoRoom
from pxd.models.library import Library
from pxd.serving.models import ModelSource, Pin
from tests.models.files import keep_part, model_shapes, write_model, write_random
from tests.tiny_models import save_tokenizer

from .leader import description

HUB = "acme/tiny"


class Lending:
    """Other nodes, which have what is in `directory`, if anything."""

    def __init__(self, directory: Path | None) -> None:
        self.directory = directory
        self.asked: list[tuple[Any, ...]] = []
        self.refuses: ModelError | None = None

    def holders(self, name: str) -> list[str]:
        return ["anna"] if self.directory else []

    async def metadata(self, name: str, fingerprint: str = "") -> Path:
        return self._give(name, fingerprint)

    async def layers(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: Any
    ) -> Path:
        return self._give(name, fingerprint, start, end)

    def _give(self, *asked: Any) -> Path:
        self.asked.append(asked)
        if self.refuses:
            raise self.refuses
        assert self.directory is not None
        return self.directory


class Hub:
    def __init__(self, patch: pytest.MonkeyPatch, directory: Path) -> None:
        self.directory = directory
        self.asked: list[tuple[Any, ...]] = []
        self.cached: Path | None = None
        patch.setattr(catalog, "fetch_metadata", self.fetch_metadata)
        patch.setattr(catalog, "fetch_layers", self.fetch_layers)
        patch.setattr(catalog, "cached_directory", lambda *_: self.cached)

    def fetch_metadata(self, name: str, progress: Any, revision: str) -> Path:
        self.asked.append((name, revision))
        return self.directory

    def fetch_layers(
        self, name: str, start: int, end: int | None, progress: Any, revision: str
    ) -> Path:
        self.asked.append((name, start, end, revision))
        progress(1.0)
        return self.directory


@pytest.fixture
def there(tmp_path: Path) -> Path:
    return write_random(tmp_path / "there")


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, there: Path) -> Hub:
    return Hub(monkeypatch, there)


class Source:
    """A `ModelSource` whose descriptions tell of which directory they are."""

    def __init__(self, root: Path, lending: Lending, pin: Pin = Pin()) -> None:  # noqa: B008
        self.described: list[Path] = []
        self.library = Library(root / "cache")
        self.models = ModelSource(self.describe, self.library, lending, lambda _: pin)

    async def describe(self, path: Path) -> ModelDescription:
        self.described.append(path)
        return description()

    async def directory(self, start: int, end: int, fingerprint: str = "") -> Path:
        ignored = lambda done, words="": None  # noqa: E731
        return await self.models.directory(HUB, fingerprint, start, end, ignored)


async def test_what_is_here_needs_nobody(tmp_path: Path, hub: Hub, there: Path) -> None:
    lending = Lending(there)
    hub.cached = there
    source = Source(tmp_path, lending)
    await source.models.describe(HUB)
    await source.models.cost(HUB)
    assert source.described == [there]
    assert await source.directory(0, 4) == there
    assert (lending.asked, hub.asked) == ([], [])


async def test_other_nodes_are_asked_before_the_hub(tmp_path: Path, hub: Hub, there: Path) -> None:
    lending = Lending(there)
    source = Source(tmp_path, lending, Pin("f", "c0ffee"))
    await source.models.describe(HUB)
    assert await source.directory(1, 3, "f") == there
    assert lending.asked == [(HUB, "f"), (HUB, "f", 1, 3)]
    assert hub.asked == []


async def test_the_hub_is_asked_for_the_revision_of_the_plan(
    tmp_path: Path, hub: Hub, there: Path
) -> None:
    source = Source(tmp_path, Lending(None), Pin("f", "c0ffee"))
    await source.models.describe(HUB)
    assert await source.directory(1, 3, "f") == there
    lending = Lending(there)
    lending.refuses = ModelError("nobody can")
    assert await Source(tmp_path, lending, Pin("f", "c0ffee")).directory(1, 3, "f") == there
    assert hub.asked == [(HUB, "c0ffee"), (HUB, 1, 3, "c0ffee"), (HUB, 1, 3, "c0ffee")]


async def test_another_model_at_the_same_place_is_not_taken(
    tmp_path: Path, hub: Hub, there: Path
) -> None:
    hub.cached = write_model(tmp_path / "another", model_shapes(tied=True))
    lending = Lending(there)
    fingerprint = describe_checkpoint(there).fingerprint
    assert await Source(tmp_path, lending).directory(0, 4, fingerprint) == there
    assert lending.asked == [(HUB, fingerprint, 0, 4)]


async def test_what_came_before_is_taken_again(tmp_path: Path, hub: Hub, there: Path) -> None:
    lending = Lending(there)
    source = Source(tmp_path, lending)
    checkpoint = describe_checkpoint(there)
    part = keep_part(HUB, there, tmp_path / "cache", checkpoint.tensors_for(1, 3))
    await source.models.describe(HUB)
    assert source.described == [part]
    assert await source.directory(1, 3, checkpoint.fingerprint) == part
    assert await source.directory(1, 3) == part
    assert lending.asked == []
    assert await source.directory(0, 3, checkpoint.fingerprint) == there
    assert await source.directory(1, 3, "of another") == there
    assert len(lending.asked) == 2


async def test_a_model_that_nobody_has(tmp_path: Path) -> None:
    lending = Lending(None)
    source = Source(tmp_path, lending)
    with pytest.raises(ModelError, match=r"there is no model '/gone'.*; no other node says"):
        await source.models.describe("/gone")
    lending.directory, lending.refuses = tmp_path, ModelError("anna sent damaged bytes")
    with pytest.raises(ModelError, match=r"^anna sent damaged bytes$"):
        await source.models.directory("/gone", "", 0, 1, lambda done, words="": None)


async def test_with_a_full_disk_the_hub_is_not_asked(tmp_path: Path, hub: Hub, there: Path) -> None:
    lending = Lending(there)
    lending.refuses = NoRoom("no space left")
    source = Source(tmp_path, lending)
    with pytest.raises(ModelError, match=r"^no space left$"):
        await source.directory(0, 1)
    with pytest.raises(ModelError, match=r"^no space left$"):
        await source.models.describe(HUB)
    assert hub.asked == []


async def test_what_is_not_wanted_any_more_does_not_go_on_coming(
    tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    ended: list[bool] = []
    over = threading.Event()

    def fetch_layers(_name: str, _start: int, _end: int, report: Any, _revision: str) -> Path:
        try:
            for part in range(1000):
                report(part / 1000)
        except ModelError:
            ended.append(True)
        finally:
            over.set()
        return tmp_path

    monkeypatch.setattr(catalog, "fetch_layers", fetch_layers)
    with trio.CancelScope() as scope:
        stop = lambda done, words="": scope.cancel()  # noqa: E731
        await Source(tmp_path, Lending(None)).models.directory(HUB, "", 0, 1, stop)
    await trio.to_thread.run_sync(over.wait, 30)
    assert ended == [True]


async def test_a_model_without_a_tokenizer_is_refused_until_it_has_one(tmp_path: Path) -> None:
    source = Source(tmp_path, Lending(None))
    path = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="has no tokenizer"):
        await source.models.describe(str(path))
    save_tokenizer(path)
    for _ in range(2):
        assert await source.models.describe(str(path)) == description()
    assert source.described == [path]


async def test_what_was_put_in_the_place_of_a_model_is_described_anew(tmp_path: Path) -> None:
    source = Source(tmp_path, Lending(None))
    path = write_model(tmp_path / "model")
    save_tokenizer(path)
    await source.models.describe(str(path))
    write_model(path, model_shapes(layers=5))
    await source.models.cost(str(path))
    assert source.described == [path] * 2
