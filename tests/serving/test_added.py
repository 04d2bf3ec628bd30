"""Models that people want to have on a node, in virtual time."""

import errno
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import pytest
import trio
from trio.testing import MockClock

from pxd.executors.protocol import ExecutorDied, ExecutorError
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError
from pxd.models.files import ModelFiles
from pxd.models.library import Library
from pxd.models.quantized import quantized_name
from pxd.serving.added import MAX_ADDED, QUANTIZE_AGAIN_S, RETRY_S, Added
from pxd.serving.choice import ChoiceError
from pxd.serving.quantizing import Quantize
from tests.models.files import write_random


class Models:
    """Fetches in a second, but for what `refuses` says. `directories` are here already, and `lent`
    is what other nodes have."""

    def __init__(self) -> None:
        self.directories: dict[str, Path] = {}
        self.lent: set[str] = set()
        self.refuses: dict[str, str] = {}
        self.fetched: list[str] = []

    async def describe(self, name: str) -> None:
        if name == "nonsense":
            raise ModelError("there is no model 'nonsense'")

    async def directory(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: object
    ) -> Path:
        await trio.sleep(1)
        if name in self.directories:
            return self.directories[name]
        if name in self.refuses:
            raise ModelError(self.refuses[name])
        assert (fingerprint, start, end) == ("", 0, None)
        self.fetched.append(name)
        return Path("/models") / name

    def holders(self, name: str) -> list[str]:
        return ["ben"] if name in self.lent else []


class Node:
    def __init__(
        self,
        root: Path,
        *names: str,
        quantize: Quantize | None = None,
        recipes: Mapping[str, tuple[str, int]] = MappingProxyType({}),
    ) -> None:
        self.models = Models()
        self.saved: list[tuple[tuple[str, ...], dict[str, tuple[str, int]]]] = []
        self.in_use: list[str] = []
        self.changes = 0
        self.library = Library(root)
        self.added = Added(
            names,
            self.models,
            self.library,
            self.save,
            lambda: self.in_use,
            self.changed,
            quantize=quantize,
            recipes=recipes,
        )

    async def save(self, *, added: tuple[str, ...], quantized: dict[str, tuple[str, int]]) -> None:
        self.saved.append((added, quantized))

    def changed(self) -> None:
        self.changes += 1

    def states(self) -> dict[str, str]:
        return {view.name: view.state for view in self.added.views()}


async def code(call) -> str:
    with pytest.raises(ChoiceError) as caught:
        await call
    return caught.value.code


async def test_a_model_is_fetched_and_remembered(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Node(tmp_path, "acme/before")
    await nursery.start(node.added.run)
    view = await node.added.add("acme/other")
    assert (view.name, view.state) == ("acme/other", "fetching")
    assert node.saved == [(("acme/before", "acme/other"), {})]
    await trio.sleep(2)
    assert node.states() == {"acme/before": "here", "acme/other": "here"}
    assert sorted(node.models.fetched) == ["acme/before", "acme/other"]
    assert node.changes > 0


async def test_what_was_here_is_looked_for_again_when_it_is_added_again(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Node(tmp_path, "acme/other")
    await nursery.start(node.added.run)
    await trio.sleep(2)
    node.models.refuses = {"acme/other": "the hub cannot be reached"}
    async with trio.open_nursery() as both:
        for name in ("other", "acme/other"):
            both.start_soon(node.added.add, name)
    await trio.sleep(2)
    assert node.states() == {"acme/other": "failed"}
    node.models.refuses = {}
    assert (await node.added.add("other")).state == "fetching"
    await trio.sleep(2)
    assert node.states() == {"acme/other": "here"}


async def test_what_cannot_be_had_is_tried_again(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Node(tmp_path)
    node.models.refuses = {"acme/other": "no space left"}
    await nursery.start(node.added.run)
    assert await code(node.added.add("nonsense")) == "bad_model"
    await node.added.add("acme/other")
    await trio.sleep(2)
    [view] = node.added.views()
    assert (view.state, view.reason) == ("failed", "no space left")
    node.models.refuses = {}
    await trio.sleep(RETRY_S + 2)
    assert node.states() == {"acme/other": "here"}


async def test_removing(clock: MockClock, tmp_path: Path, nursery: trio.Nursery) -> None:
    node = Node(tmp_path, "acme/other")
    await nursery.start(node.added.run)
    node.in_use = ["acme/other"]
    assert await code(node.added.remove("acme/other")) == "in_use"
    assert await code(node.added.remove("acme/unknown")) == "unknown_model"
    node.in_use = []
    removed = await node.added.remove("other")
    assert (removed.model, removed.deleted) == ("acme/other", False)
    await trio.sleep(RETRY_S)
    assert (node.states(), node.models.fetched, node.saved) == ({}, [], [((), {})])


async def test_no_more_than_a_record_has_room_for(clock: MockClock, tmp_path: Path) -> None:
    node = Node(tmp_path, *(f"acme/{number}" for number in range(MAX_ADDED)))
    assert await code(node.added.add("acme/other")) == "full"


class Making(Node):
    """A node that has /models/source and quantises it in a second; `breaks` is raised first."""

    def __init__(self, root: Path, *names: str, **more: Any) -> None:
        self.source = write_random(root / "source", layers=1)
        self.made: list[tuple[Path, int]] = []
        self.breaks: Exception | None = None
        self.root = root / "cache" / "models"
        super().__init__(root / "cache", *names, quantize=self.quantize, **more)
        self.models.directories = {"/models/source": self.source}
        self.library.elsewhere = (  # type: ignore[method-assign]
            lambda name, revision="": self.models.directories.get(name)
        )

    async def quantize(
        self, source: Path, target: Path, bits: int, progress: Callable[[float], None]
    ) -> None:
        write_random(target, layers=1)
        self.made.append((source, bits))
        progress(0.5)
        await trio.sleep(1)
        if self.breaks is not None:
            raise self.breaks

    def left(self) -> list[str]:
        """What is in the store, whatever it is."""
        return [path.name for path in self.root.glob("*")]


COPY = "source-4bit"


async def test_a_quantised_copy_is_made_kept_and_remembered(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Making(tmp_path)
    await nursery.start(node.added.run)
    assert (await node.added.add("/models/source", 4)).name == COPY
    await trio.sleep(1.5)
    [view] = node.added.views()
    assert (view.state, view.progress, view.reason) == ("fetching", 0.5, "quantising to 4 bits")
    await trio.sleep(1)
    assert node.states() == {COPY: "here"}
    assert node.made == [(node.source, 4)]
    assert node.saved[-1] == ((COPY,), {COPY: ("/models/source", 4)})
    directory = node.library.find_layers(COPY, "", 0, None)
    assert directory is not None
    assert describe_checkpoint(directory).absent == frozenset()
    # To other nodes it is a model like any.
    files = ModelFiles(directory, tmp_path / "digests")
    assert all(sum(count for _, count in file.held) > 1 for file in files.manifest.weights)
    assert node.library.store.label(directory).fingerprint == files.manifest.fingerprint
    await node.added.remove(COPY)
    assert (node.left(), node.saved[-1]) == ([], ((), {}))


async def test_after_a_restart_a_copy_is_still_made(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Making(tmp_path, COPY, recipes={COPY: ("/models/source", 4)})
    half = node.library.store.workplace(COPY)
    write_random(half, layers=1)
    await nursery.start(node.added.run)
    await trio.sleep(3)
    assert node.states() == {COPY: "here"}
    assert len(node.left()) == 1
    again = Added(
        [COPY], node.models, node.library, node.save, list, node.changed,
        quantize=None, recipes={COPY: ("/models/source", 4)},
    )  # fmt: skip
    await nursery.start(again.run)
    await trio.testing.wait_all_tasks_blocked()
    await trio.sleep(1)
    assert [view.state for view in again.views()] == ["here"]
    assert len(node.made) == 1


@pytest.mark.parametrize(
    ("breaks", "reason", "again_s"),
    [
        (ExecutorError("mlx-lm cannot convert it"), "mlx-lm cannot convert it", QUANTIZE_AGAIN_S),
        (ExecutorDied("it was killed"), "it was killed", QUANTIZE_AGAIN_S),
        (OSError(errno.ENOSPC, "No space left"), f"no space left for {COPY}: free some", RETRY_S),
    ],
)
async def test_of_half_a_copy_nothing_stays(
    clock: MockClock,
    tmp_path: Path,
    nursery: trio.Nursery,
    breaks: Exception,
    reason: str,
    again_s: float,
) -> None:
    node = Making(tmp_path)
    node.breaks = breaks
    await nursery.start(node.added.run)
    await node.added.add("/models/source", 4)
    await trio.sleep(5)
    [view] = node.added.views()
    assert view.state == "failed"
    assert reason in view.reason
    assert node.left() == []
    # It is tried again when it is asked for, and by itself.
    assert (await node.added.add("/models/source", 4)).state == "fetching"
    await trio.sleep(5)
    assert len(node.made) == 2
    await trio.sleep(again_s - 10)
    assert len(node.made) == 2
    node.breaks = None
    await trio.sleep(10)
    assert (node.states(), len(node.made)) == ({COPY: "here"}, 3)


async def test_removed_while_it_is_made(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Making(tmp_path)
    await nursery.start(node.added.run)
    await node.added.add("/models/source", 4)
    await trio.sleep(1.5)
    assert len(node.left()) == 1
    await node.added.remove(COPY)
    assert (node.left(), node.states()) == ([], {})


async def test_a_copy_that_another_node_has_is_fetched(
    clock: MockClock, tmp_path: Path, nursery: trio.Nursery
) -> None:
    node = Making(tmp_path)
    node.models.lent = {COPY}
    await nursery.start(node.added.run)
    await node.added.add("/models/source", 4)
    await trio.sleep(3)
    assert (node.states(), node.models.fetched, node.made) == ({COPY: "here"}, [COPY], [])
    node.models.refuses = {"source-8bit": "half of it is nowhere"}
    node.models.lent = {"source-8bit"}
    await node.added.add("/models/source", 8)
    await trio.sleep(4)
    assert node.made == [(node.source, 8)]


async def test_what_cannot_be_quantised(clock: MockClock, tmp_path: Path) -> None:
    node = Making(tmp_path)
    config = node.source / "config.json"
    whole = config.read_text()
    quantized = json.loads(whole) | {"quantization": {"bits": 8, "group_size": 64}}
    config.write_text(json.dumps(quantized))
    with pytest.raises(ChoiceError, match="is quantised already to 8 bits: serve it as it is"):
        await node.added.add("/models/source", 4)
    config.write_text(whole)
    node.models.directories[COPY] = tmp_path
    with pytest.raises(ChoiceError, match="there is another source-4bit on this node already"):
        await node.added.add("/models/source", 4)
    other = Node(tmp_path / "other")
    with pytest.raises(ChoiceError, match="executor cannot serve what MLX quantises"):
        await other.added.add("acme/other", 4)
    assert (node.states(), node.saved, other.saved) == ({}, [], [])


def test_the_names_of_copies() -> None:
    names = {"acme/other": "acme/other-4bit", "/models/tiny": "tiny-4bit", "demo": "demo-4bit"}
    assert {name: quantized_name(name, 4) for name in names} == names
