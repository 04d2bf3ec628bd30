"""What a stage will take, whether it fits, and what is left for KV."""

import logging
from pathlib import Path

import msgspec
import pytest

from pxd.executors.memory import RESERVE, check_fits, compare, kv_room, stage_bytes
from pxd.executors.mlx import engine as engine_module
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import ExecutorError, LoadSpec, StageInfo
from pxd.models.catalog import DEMO_DIRECTORY
from pxd.models.describe import describe_checkpoint
from tests.models.files import model_shapes, write_model

GIB = 1 << 30


@pytest.mark.parametrize("tied", [False, True])
def test_stages_take_their_layers_and_ends(tmp_path: Path, tied: bool) -> None:
    """Layers of 128, 256 and 384 bytes, a matrix of 160 at each end, a norm of 16."""
    checkpoint = describe_checkpoint(write_model(tmp_path, model_shapes(tied=tied)))
    assert stage_bytes(checkpoint, 1, 2) == 256
    assert stage_bytes(checkpoint, 0, 2) == 128 + 256 + 160
    assert stage_bytes(checkpoint, 2, 3) == 384 + 160 + 16
    assert stage_bytes(checkpoint, 0, 3) == 768 + 16 + (160 if tied else 320)


def test_weights_have_to_fit_beside_a_reserve() -> None:
    check_fits(3 * GIB, 3 * GIB + RESERVE, "")
    with pytest.raises(ExecutorError, match=r"take 3\.00 GiB.*only 2\.00 GiB.*; do this"):
        check_fits(3 * GIB, 2 * GIB + RESERVE, "do this")
    with pytest.raises(ExecutorError, match=r"only 0\.00 GiB"):
        check_fits(3 * GIB, 0, "")


def test_kv_gets_what_is_planned_or_what_is_there(caplog: pytest.LogCaptureFixture) -> None:
    assert kv_room(2 * GIB, 9 * GIB, 100, "") == 2 * GIB
    assert not caplog.records
    assert kv_room(2 * GIB, GIB + RESERVE, 100, "") == GIB
    assert "1.00 GiB are free for KV caches, less than the 2.00 GiB planned" in caplog.text
    assert kv_room(0, 0, 100, "") == 0
    assert kv_room(50, GIB, 100, "") == 50
    for free in (-GIB, 0, RESERVE + 99):
        with pytest.raises(ExecutorError, match=r"no memory for KV caches.*; do this"):
            kv_room(2 * GIB, free, 100, "do this")


def test_a_stage_that_takes_more_than_computed_is_noted(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    compare(GIB, GIB + RESERVE)
    assert not caplog.records
    compare(GIB, 2 * GIB)
    assert "take 2.00 GiB, although 1.00 GiB were computed" in caplog.text


def load_demo(kv_bytes: int) -> StageInfo:
    spec = LoadSpec(path=str(DEMO_DIRECTORY), start=0, end=3, kv_bytes=kv_bytes)
    return MlxEngine().load(spec, lambda _: None)


@pytest.mark.slow
def test_the_engine_computes_what_it_takes_and_keeps_to_what_is_free(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # The first load of a process has MLX make its random state, which is no weight.
    load_demo(1 << 26)
    plenty = load_demo(1 << 26)
    computed = stage_bytes(describe_checkpoint(DEMO_DIRECTORY), 0, 3)
    assert plenty.weight_bytes == pytest.approx(computed, rel=0.05)

    monkeypatch.setattr(engine_module, "free_memory", lambda: RESERVE + computed - 1)
    with pytest.raises(ExecutorError, match="--memory, or add a node"):
        load_demo(1 << 26)

    monkeypatch.setattr(engine_module, "free_memory", lambda: RESERVE + (1 << 25))
    less = load_demo(1 << 26)
    assert less == msgspec.structs.replace(plenty, kv_tokens=plenty.kv_tokens // 2)
