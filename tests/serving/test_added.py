"""Models that people want to have on a node, in virtual time."""

from pathlib import Path

import pytest
import trio
from trio.testing import MockClock

from pxd.models.errors import ModelError
from pxd.models.library import Library
from pxd.serving.added import MAX_ADDED, RETRY_S, Added
from pxd.serving.choice import ChoiceError


class Models:
    """Fetches at once, but for what `refuses` says."""

    def __init__(self) -> None:
        self.refuses: dict[str, str] = {}
        self.fetched: list[str] = []

    async def describe(self, name: str) -> None:
        if name == "nonsense":
            raise ModelError("there is no model 'nonsense'")

    async def directory(
        self, name: str, fingerprint: str, start: int, end: int | None, progress: object
    ) -> Path:
        await trio.sleep(1)
        if name in self.refuses:
            raise ModelError(self.refuses[name])
        assert (fingerprint, start, end) == ("", 0, None)
        self.fetched.append(name)
        return Path("/models") / name


class Node:
    def __init__(self, root: Path, *names: str) -> None:
        self.models = Models()
        self.saved: list[tuple[str, ...]] = []
        self.in_use: list[str] = []
        self.changes = 0
        self.library = Library(root)
        self.added = Added(
            names, self.models, self.library, self.save, lambda: self.in_use, self.changed
        )

    async def save(self, *, added: tuple[str, ...]) -> None:
        self.saved.append(added)

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
    assert node.saved == [("acme/before", "acme/other")]
    await trio.sleep(2)
    assert node.states() == {"acme/before": "here", "acme/other": "here"}
    assert (await node.added.add("other")).state == "here"
    assert sorted(node.models.fetched) == ["acme/before", "acme/other"]
    assert node.changes > 0


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
    assert (node.states(), node.models.fetched, node.saved) == ({}, [], [()])


async def test_no_more_than_a_record_has_room_for(clock: MockClock, tmp_path: Path) -> None:
    node = Node(tmp_path, *(f"acme/{number}" for number in range(MAX_ADDED)))
    assert await code(node.added.add("acme/other")) == "full"
