"""What the SGLang executor does before SGLang is asked, which need not be installed for that."""

import json
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.cluster.records import Device
from pxd.engine.blocks import BLOCK_TOKENS, blocks_for
from pxd.executors import choice
from pxd.executors.protocol import ExecutorError
from pxd.executors.sglang import pinned
from pxd.executors.sglang.models import DISABLED, architecture_of, find_code, only
from pxd.executors.sglang.passes import Entry, layout_of, passes_of
from pxd.executors.sglang.view import TIED_HEAD, make_view
from pxd.models.describe import INDEX_NAME, describe_checkpoint
from pxd.models.safetensors import read_header
from pxd.wire import Row
from tests.models.files import model_shapes, write_model, write_sharded


@st.composite
def steps(draw: st.DrawFn) -> tuple[list[Row], list[list[int]]]:
    """Rows with their requests' tables; some requests have several rows."""
    rows, tables = [], []
    for request in range(draw(st.integers(1, 6))):
        position = draw(st.integers(0, 200))
        counts = draw(st.lists(st.integers(1, 90), min_size=1, max_size=3))
        draws = draw(st.integers(0, min(counts[-1], 4)))
        table = [1000 * request + i for i in range(blocks_for(position + sum(counts)))]
        for number, count in enumerate(counts):
            last = number == len(counts) - 1
            rows.append(Row(request, position, count, draws if last else 0))
            tables.append(table)
            position += count
    return rows, tables


@given(steps(), st.integers(1, 4))
def test_every_position_is_computed_once_and_behind_those_before_it(
    step: tuple[list[Row], list[list[int]]], most: int
) -> None:
    rows, tables = step
    passes = passes_of(rows, tables, most)
    assert sorted(place for part in passes for place in part.places) == list(
        range(sum(row.count for row in rows))
    )
    owners = [(row.request, row.position + i) for row in rows for i in range(row.count)]
    reached = {row.request: row.position for row in reversed(rows)}
    for part in passes:
        assert 1 <= len(part.entries) <= most
        places = iter(part.places)
        for entry in part.entries:
            assert entry.count == 1 or not part.decodes
            for position in range(entry.position, entry.position + entry.count):
                request, place = owners[next(places)]
                assert place == position == reached[request]
                assert entry.table[0] == 1000 * request
                reached[request] += 1
    begin = 0
    decoded = {place for part in passes if part.decodes for place in part.places}
    for row in rows:
        begin += row.count
        assert set(range(begin - row.draws, begin)) <= decoded
        assert not decoded & set(range(begin - row.count, begin - row.draws))


def test_blocks_lie_behind_the_first_page() -> None:
    layout = layout_of([Entry(63, 3, (7, 2)), Entry(0, 1, (0, 9))])
    assert layout.tables.tolist() == [[8, 3], [1, 0]]
    assert layout.slots.tolist() == [
        8 * BLOCK_TOKENS + 63,
        3 * BLOCK_TOKENS,
        3 * BLOCK_TOKENS + 1,
        BLOCK_TOKENS,
    ]
    assert layout.ends.tolist() == [66, 1]
    assert layout.slots.dtype == np.int64


def view_of(source: Path, target: Path, start: int, end: int) -> tuple[dict[str, str], Any]:
    target.mkdir()
    make_view(source, target, describe_checkpoint(source), start, end, "LlamaForCausalLM")
    index = json.loads((target / INDEX_NAME).read_text())["weight_map"]
    for tensor, file in index.items():
        assert tensor in read_header(target / file)
    return index, json.loads((target / "config.json").read_text())


def test_a_view_shows_just_what_its_stage_needs(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model", model_shapes(), shards=6)
    index, config = view_of(source, tmp_path / "middle", 1, 2)
    assert set(index) == {"model.layers.1.mlp.weight"}
    assert {path.name for path in (tmp_path / "middle").iterdir()} == {
        *index.values(),
        INDEX_NAME,
        "config.json",
    }
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["tie_word_embeddings"] is False
    index, config = view_of(source, tmp_path / "whole", 0, 3)
    assert set(index) == set(model_shapes())
    assert "tie_word_embeddings" not in config


def test_a_last_stage_has_a_copy_of_a_tied_embedding(tmp_path: Path) -> None:
    shapes = model_shapes(tied=True)
    source = write_model(tmp_path / "model", shapes, {"tie_word_embeddings": True})
    path = source / "model.safetensors"
    data = path.read_bytes()
    info = read_header(path)["model.embed_tokens.weight"]
    begin = 8 + int.from_bytes(data[:8], "little") + info.data_offsets[0]
    embedding = bytes(range(info.nbytes))
    path.write_bytes(data[:begin] + embedding + data[begin + info.nbytes :])

    index, config = view_of(source, tmp_path / "last", 2, 3)
    assert index["lm_head.weight"] == TIED_HEAD
    assert config["tie_word_embeddings"] is False
    copied = (tmp_path / "last" / TIED_HEAD).read_bytes()
    assert read_header(tmp_path / "last" / TIED_HEAD)["lm_head.weight"].shape == info.shape
    assert copied.endswith(embedding)
    # Where embedding and projection are in one place they share it.
    index, config = view_of(source, tmp_path / "whole", 0, 3)
    assert "lm_head.weight" not in index
    assert config["tie_word_embeddings"] is True


def test_files_that_are_not_there_are_missed_where_they_are_needed(tmp_path: Path) -> None:
    source = write_sharded(tmp_path / "model", model_shapes(), shards=6)
    file = describe_checkpoint(source).shards["model.layers.2.mlp.weight"]
    (source / file).unlink()
    view_of(source, tmp_path / "middle", 1, 2)
    with pytest.raises(ExecutorError, match=file):
        view_of(source, tmp_path / "last", 2, 3)


def test_what_only_mlx_reads_is_refused(tmp_path: Path) -> None:
    source = write_model(tmp_path / "model", None, {"quantization": {"bits": 4, "group_size": 32}})
    with pytest.raises(ExecutorError, match="MLX's own way"):
        view_of(source, tmp_path / "whole", 0, 3)


@pytest.fixture
def code(tmp_path: Path) -> Path:
    directory = tmp_path / "models"
    directory.mkdir()
    (directory / "plain.py").write_text(
        "class PlainForCausalLM(nn.Module):\n    def forward(self, input_ids): ...\n"
    )
    (directory / "staged.py").write_text(
        "class Staged(nn.Module):\n    def forward(self, ids, *, pp_proxy_tensors=None): ...\n"
        "class StagedForCausalLM(Staged):\n    pass\n"
    )
    (directory / "derived.py").write_text(
        "from sglang.srt.models.staged import StagedForCausalLM\n"
        "class DerivedForCausalLM(StagedForCausalLM):\n    pass\n"
    )
    (directory / "strange.py").write_text(
        "from sglang.srt.models.strange import Odd\nclass Even(Odd):\n    pass\nOdd = Even\n"
    )
    return directory


@pytest.mark.parametrize(
    ("name", "module", "staged"),
    [
        ("PlainForCausalLM", "plain", False),
        ("StagedForCausalLM", "staged", True),
        ("DerivedForCausalLM", "derived", True),
        ("Even", "strange", False),
    ],
)
def test_a_models_code_tells_whether_it_can_be_a_stage(
    code: Path, name: str, module: str, staged: bool
) -> None:
    assert find_code(name, code) == (module, staged)


def test_only_the_model_that_is_wanted_is_imported(code: Path) -> None:
    environment: dict[str, str] = {}
    only("staged", code, environment)
    assert environment == {DISABLED: "derived,plain,strange"}
    only("plain", code, environment)
    assert environment == {DISABLED: "derived,plain,strange"}
    with pytest.raises(ExecutorError, match="no model code for Other"):
        find_code("Other", code)


def test_a_configuration_without_architectures_is_known_by_its_kind() -> None:
    known = {"llama": "LlamaForCausalLM"}
    assert architecture_of({"architectures": ["A"], "model_type": "llama"}, known) == "A"
    assert architecture_of({"model_type": "llama"}, known) == "LlamaForCausalLM"
    for config in ({"model_type": "new"}, {"architectures": [7]}, {}):
        with pytest.raises(ExecutorError, match="names no architecture"):
            architecture_of(config, known)


@pytest.mark.parametrize(
    ("version", "words"),
    [(None, "not installed"), ("0.5.22", r"0\.5\.22 is installed"), ("0.5.23", "")],
)
def test_another_release_is_refused(
    monkeypatch: pytest.MonkeyPatch, version: str | None, words: str
) -> None:
    def installed(_name: str) -> str:
        if version is None:
            raise metadata.PackageNotFoundError
        return version

    monkeypatch.setattr(metadata, "version", installed)
    if not words:
        pinned.check_version()
        return
    with pytest.raises(ImportError, match=rf"{words}; .*sglang==0\.5\.23"):
        pinned.check_version()


def test_a_release_that_was_changed_is_told_by_what_it_lacks() -> None:
    there = {"pathlib": ("Path", "Path.glob")}
    pinned.check_symbols(there)
    lacking = {**there, "json": ("loads", "burden", "JSONDecoder.guess"), "pathlab": ("Path",)}
    with pytest.raises(ExecutorError) as caught:
        pinned.check_symbols(lacking)
    words = str(caught.value)
    assert "json.burden, json.JSONDecoder.guess, pathlab (" in words
    assert "loads" not in words


async def test_sglang_is_only_taken_when_it_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []

    async def measure(*, kind: str, timeout: float) -> Device:
        measured.append(kind)
        return Device(kind="cuda", executors=(kind,))

    monkeypatch.setattr(choice, "measure_device", measure)
    monkeypatch.setattr(choice, "installed_kinds", lambda: ("mlx", "torch", "sglang"))
    monkeypatch.setattr(choice.sys, "platform", "linux")
    assert (await choice.choose_executor("auto")).executors == ("mlx",)
    assert measured == ["mlx", "torch"]
    assert (await choice.choose_executor("sglang")).executors == ("sglang",)


def test_a_node_offers_what_its_ranks_have_together() -> None:
    device = Device(kind="cuda", memory=80, tflops=100.0, bandwidth=2.0, executors=("sglang",))
    assert choice.spread(device, 1) == device
    assert choice.spread(device, 4) == Device(
        kind="cuda", memory=320, tflops=400.0, bandwidth=8.0, executors=("sglang",)
    )
