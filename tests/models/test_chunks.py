"""How files are cut, and what journals remember of them."""

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd.models.chunks import CHUNK_BYTES, DIGEST_BYTES, Grid, digest_of
from pxd.models.journal import UNKNOWN, Journal
from pxd.models.manifest import Held, WeightsFile, runs_of
from pxd.models.safetensors import TensorInfo

SIZES = st.one_of(
    st.integers(0, 3 * CHUNK_BYTES),
    st.sampled_from([0, 1, CHUNK_BYTES - 1, CHUNK_BYTES, CHUNK_BYTES + 1]),
)
HEAD = 123


def header(sizes: list[int]) -> dict[str, TensorInfo]:
    tensors, position = {}, 0
    for number, size in enumerate(sizes):
        tensors[f"t{number}"] = TensorInfo("U8", (size,), (position, position + size))
        position += size
    return tensors


@given(st.lists(SIZES, max_size=8))
def test_the_chunks_of_all_tensors_are_the_file_without_its_header(sizes: list[int]) -> None:
    tensors = header(sizes)
    grid = Grid("f", tensors, HEAD + sum(sizes))
    chunks = list(grid.of(tensors))
    assert chunks == [grid[number] for number in range(grid.count)]
    position = HEAD
    for chunk in chunks:
        assert chunk.offset == position
        assert 0 < chunk.size <= CHUNK_BYTES
        position += chunk.size
    assert position == HEAD + sum(sizes)
    for bad in (-1, grid.count):
        with pytest.raises(IndexError):
            grid[bad]


@given(st.lists(SIZES, min_size=1, max_size=6), st.data())
def test_a_tensor_has_its_own_bytes_and_no_others(sizes: list[int], data: st.DataObject) -> None:
    tensors = header(sizes)
    grid = Grid("f", tensors, HEAD + sum(sizes))
    name = data.draw(st.sampled_from(sorted(tensors)))
    begin, end = tensors[name].data_offsets
    chunks = list(grid.of([name, "of another file"]))
    assert sum(chunk.size for chunk in chunks) == end - begin
    assert {grid.tensor_of(chunk.number) for chunk in chunks} <= {name}
    if chunks:
        assert (chunks[0].offset, chunks[-1].offset + chunks[-1].size) == (HEAD + begin, HEAD + end)
    held = [grid.tensor_of(number) != name for number in range(grid.count)]
    assert set(grid.lacking(held)) == ({name} if chunks else set())
    assert set(grid.lacking([True] * grid.count)) == set()


@given(st.lists(st.booleans(), max_size=40))
def test_runs_say_what_is_held(held: list[bool]) -> None:
    grid = Grid("f", header([1] * len(held)), HEAD + len(held))
    weights = WeightsFile("f", HEAD, HEAD, UNKNOWN, tuple(runs_of(held)))
    has = Held([weights])
    assert [has(grid[number]) for number in range(grid.count)] == held
    assert not any(has(grid[n]._replace(file="g")) for n in range(grid.count))


def test_a_journal_outlives_its_process_and_forgets_when_told(tmp_path: Path) -> None:
    path = tmp_path / "side" / "f.chunks"
    one, other = digest_of(b"one"), digest_of(b"other")
    journal = Journal(path, 4)
    assert journal.held() == [False] * 4
    journal.put({1: one, 3: other})
    again = Journal(path, 4)
    assert [again[number] for number in range(4)] == [None, one, None, other]
    again.put({1: UNKNOWN})
    assert Journal(path, 4).held() == [False, False, False, True]
    assert path.stat().st_size == 4 * DIGEST_BYTES


def test_a_journal_of_another_file_is_not_believed(tmp_path: Path) -> None:
    Journal(tmp_path / "f", 4).put({0: digest_of(b"")})
    assert Journal(tmp_path / "f", 5).held() == [False] * 5
    Journal(tmp_path / "f", 5).put({4: digest_of(b"")})
    assert Journal(tmp_path / "f", 5).held() == [False] * 4 + [True]
