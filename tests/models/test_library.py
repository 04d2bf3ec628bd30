"""Which of several directories is taken, and what becomes of those that came from other nodes."""

from pathlib import Path

import pytest
from huggingface_hub import constants

from pxd.models.describe import describe_checkpoint
from pxd.models.library import Library
from tests.models.files import keep_part, model_shapes, write_model, write_random

HUB = "acme/tiny"
OLD, NEW = "0" * 40, "1" * 40


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The hub's, with an old commit and a newer one that `main` names."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    repository = tmp_path / "hub" / "models--acme--tiny"
    for commit, shapes in ((OLD, model_shapes()), (NEW, model_shapes(tied=True))):
        directory = write_model(repository / "snapshots" / commit, shapes)
        (directory / "tokenizer.json").write_text("{}")
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(NEW)
    return repository / "snapshots"


def test_the_revision_that_is_meant_is_found(cache: Path, tmp_path: Path) -> None:
    library = Library(tmp_path)
    old = describe_checkpoint(cache / OLD).fingerprint
    assert library.find(HUB) == cache / NEW
    assert library.find(HUB, revision=OLD) == cache / OLD
    assert library.find(HUB, old, OLD) == library.find_layers(HUB, old, 0, 3, OLD) == cache / OLD
    assert library.find(HUB, old) is None
    assert library.revision(HUB, cache / OLD) == OLD
    assert library.revision("demo", cache / OLD) == ""


def test_single_files_in_the_cache_are_no_model(cache: Path, tmp_path: Path) -> None:
    """Other programs fetch a configuration alone."""
    (cache / NEW / "tokenizer.json").unlink()
    assert Library(tmp_path).find(HUB) is None


def test_what_came_from_other_nodes_is_found_last_and_can_be_removed(
    cache: Path, tmp_path: Path
) -> None:
    library = Library(tmp_path)
    source = write_random(tmp_path / "source")
    checkpoint = describe_checkpoint(source)
    mark = checkpoint.fingerprint
    part = keep_part(HUB, source, tmp_path, checkpoint.tensors_for(1, 3))
    other = keep_part("acme/other", source, tmp_path, checkpoint.tensors_for(0, 1))
    assert part != other
    assert library.find(HUB) == cache / NEW
    assert library.find(HUB, mark) == library.find_layers(HUB, mark, 2, 3) == part
    assert library.find_layers(HUB, mark, 2, 4) is None
    assert library.find_layers("acme/other", mark, 0, None) is None
    assert library.store.names() == ["acme/other", HUB]
    assert library.store.remove(HUB) == 1
    assert library.store.remove(HUB) == 0
    assert not part.exists()
    assert library.find("acme/other") == other


def test_a_directory_that_was_deleted_by_half_is_not_found(tmp_path: Path) -> None:
    source = write_random(tmp_path / "source")
    part = keep_part(HUB, source, tmp_path, frozenset())
    (part / ".pxd" / "model.json").write_text("{")
    library = Library(tmp_path)
    assert library.store.find(HUB) is None
    assert library.store.names() == []


def test_a_copy_whose_making_was_killed_can_be_removed(tmp_path: Path) -> None:
    store = Library(tmp_path).store
    place = write_model(store.workplace("acme/tiny-4bit"))
    assert store.remove("acme/tiny-4bit") == 0
    assert not place.exists()
