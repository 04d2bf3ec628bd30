import json
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pxd.models.errors import ModelError
from pxd.models.safetensors import read_header
from tests.models.files import write_raw, write_safetensors


def entry(begin: int, end: int, dtype: str = "U8", shape: tuple[int, ...] | None = None) -> dict:
    return {"dtype": dtype, "shape": shape or (end - begin,), "data_offsets": (begin, end)}


def test_reads_names_types_shapes_and_sizes(tmp_path: Path) -> None:
    path = write_safetensors(
        tmp_path / "a.safetensors", {"x": ("BF16", (3, 4)), "y": ("F32", ()), "z": ("F32", (0, 5))}
    )
    header = read_header(path)
    assert {name: (t.dtype, t.shape, t.nbytes) for name, t in header.items()} == {
        "x": ("BF16", (3, 4), 24),
        "y": ("F32", (), 4),
        "z": ("F32", (0, 5), 0),
    }


@pytest.mark.parametrize(
    ("header", "data"),
    [
        (b"", b""),
        (b"[]", b""),
        (b"{", b""),
        (b'{"x": 5}', b""),
        (b'{"x": {"dtype": "U8", "shape": [-1], "data_offsets": [0, 1]}}', b"1"),
        (json.dumps({"x": entry(0, 8)}).encode(), b"1234567"),
        (json.dumps({"x": entry(0, 8)}).encode(), b"123456789"),
        (json.dumps({"x": entry(0, 4), "y": entry(2, 6)}).encode(), b"123456"),
        (json.dumps({"x": entry(0, 4), "y": entry(5, 6)}).encode(), b"123456"),
        (json.dumps({"x": entry(4, 0, shape=(1,))}).encode(), b""),
        (json.dumps({"x": entry(0, 4, "F32", (2,))}).encode(), b"1234"),
        (json.dumps({"x": entry(0, 4, "U8", (1 << 40, 1 << 40))}).encode(), b"1234"),
    ],
)
def test_damaged_or_hostile_headers_are_refused(tmp_path: Path, header: bytes, data: bytes) -> None:
    with pytest.raises(ModelError, match="damaged"):
        read_header(write_raw(tmp_path / "bad.safetensors", header, data))


@pytest.mark.parametrize("content", [b"", b"\x01", b"\xff" * 8, b"\xff" * 64, b"\0" * 8])
def test_a_header_length_beyond_the_file_is_refused_before_it_is_read(
    tmp_path: Path, content: bytes
) -> None:
    path = tmp_path / "bad.safetensors"
    path.write_bytes(content)
    with pytest.raises(ModelError, match="damaged"):
        read_header(path)


@settings(deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200))
def test_any_bytes_give_tensors_or_a_model_error(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "any.safetensors"
    path.write_bytes(content)
    try:
        header = read_header(path)
    except ModelError:
        return
    assert sum(tensor.nbytes for tensor in header.values()) <= len(content)
