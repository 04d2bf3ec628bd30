"""Telling revisions of a model apart."""

from pathlib import Path

import pytest

from pxd.models.catalog import DEMO_DIRECTORY, cached_directory
from pxd.models.errors import ModelError
from pxd.models.fingerprint import fingerprint

from .files import model_shapes, write_model


def test_the_same_files_have_the_same_mark_wherever_they_are(tmp_path: Path) -> None:
    one, other = write_model(tmp_path / "one"), write_model(tmp_path / "other")
    mark = fingerprint(one)
    assert len(mark) == 32
    assert mark == fingerprint(other)
    assert len(fingerprint(DEMO_DIRECTORY)) == 32
    assert fingerprint(DEMO_DIRECTORY) != mark


def test_what_makes_another_revision(tmp_path: Path) -> None:
    before = fingerprint(write_model(tmp_path / "a"))
    assert fingerprint(write_model(tmp_path / "b", config={"rope_theta": 1.0})) != before
    assert fingerprint(write_model(tmp_path / "c", model_shapes(tied=True))) != before
    (tmp_path / "a" / "tokenizer.json").write_text("{}")
    assert fingerprint(tmp_path / "a") != before


def test_with_an_index_no_part_of_the_weights_matters(tmp_path: Path) -> None:
    """Each node has only the files with its own layers."""
    part, whole = write_model(tmp_path / "part"), write_model(tmp_path / "whole")
    for directory in (part, whole):
        (directory / "model.safetensors.index.json").write_text('{"weight_map": {}}')
    (part / "model.safetensors").unlink()
    assert fingerprint(part) == fingerprint(whole)


def test_a_hub_model_of_which_nothing_is_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert cached_directory("some/model") is None


def test_a_hub_model_in_the_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    home = tmp_path / "models--some--model"
    snapshot = write_model(home / "snapshots" / ("0" * 40))
    (home / "refs").mkdir()
    (home / "refs" / "main").write_text("0" * 40)
    assert cached_directory("some/model") == snapshot


def test_files_that_cannot_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_: Path) -> bytes:
        raise PermissionError("no")

    directory = write_model(tmp_path)
    monkeypatch.setattr(Path, "read_bytes", refuse)
    with pytest.raises(ModelError, match="cannot be read"):
        fingerprint(directory)
