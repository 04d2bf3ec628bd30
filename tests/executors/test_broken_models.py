"""Models that cannot be served: one clear error each, that says what to do."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pxd.executors.mlx.describe import describe
from pxd.executors.mlx.engine import MlxEngine
from pxd.executors.protocol import ExecutorError, LoadSpec
from pxd.models.chat import ChatTokenizer
from pxd.models.errors import ModelError
from tests.tiny_models import make_tiny_model

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("qwen3", tmp_path_factory.mktemp("sound") / "model", shards=3)


@pytest.fixture
def directory(sound: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(sound, tmp_path / "model"))


def change_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    config = {**json.loads(path.read_text()), **changes}
    path.write_text(json.dumps({k: v for k, v in config.items() if v is not None}))


def first_shard(directory: Path) -> Path:
    return directory / "model-00001-of-00003.safetensors"


def truncate(directory: Path) -> None:
    path = first_shard(directory)
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def load(directory: Path, start: int = 0, end: int = 3) -> None:
    spec = LoadSpec(path=str(directory), start=start, end=end, kv_bytes=1 << 26)
    MlxEngine().load(spec, lambda _: None)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda directory: change_config(directory, model_type="gpt17"),
            r"cannot run gpt17 models.*choose another",
        ),
        (
            lambda directory: change_config(directory, num_hidden_layers=None),
            r"config\.json lacks num_hidden_layers.*take it from",
        ),
        (
            lambda directory: change_config(directory, num_hidden_layers=-1),
            r"num_hidden_layers = -1; that cannot be right",
        ),
        (truncate, r"model-00001-of-00003\.safetensors is damaged or incomplete.*fetch it again"),
        (
            lambda directory: (directory / "config.json").unlink(),
            r"has no config\.json",
        ),
    ],
)
def test_neither_described_nor_loaded(
    directory: Path, spoil: Callable[[Path], object], message: str
) -> None:
    spoil(directory)
    for attempt in (describe, load):
        with pytest.raises(ExecutorError, match=message):
            attempt(directory)


def test_a_missing_shard_matters_to_the_stages_that_need_it(directory: Path) -> None:
    """It may come later, or lie on another node: so the model can be described all the same."""
    first_shard(directory).unlink()
    assert describe(directory).splits == (1, 2, 3, 4, 5)
    with pytest.raises(ExecutorError, match=r"lacks model-00001-of-00003.*fetch the model again"):
        load(directory)


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda directory: (directory / "tokenizer.json").unlink(), "has no tokenizer; put"),
        (
            lambda directory: (directory / "tokenizer.json").write_text('{"version":'),
            "cannot be loaded; fetch it again",
        ),
    ],
)
def test_tokenizers(directory: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(directory)
    with pytest.raises(ModelError, match=message):
        ChatTokenizer.load(directory)
