"""Model directories that cannot be served: people are told why, in one sentence."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from pxd.executors.mlx.describe import describe
from pxd.executors.protocol import ExecutorError, ModelDescription
from pxd.models.errors import ModelError
from pxd.models.library import Library
from pxd.serving.models import ModelSource
from tests.serving.test_models import Lending
from tests.tiny_models import make_tiny_model


@pytest.fixture(scope="module")
def sound(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "llama", shards=2)


def source(root: Path) -> ModelSource:
    async def describe_here(path: Path) -> ModelDescription:
        return describe(path)

    return ModelSource(describe_here, Library(root / "cache"), Lending(None))


def config(**changes: object) -> Callable[[Path], None]:
    def change(directory: Path) -> None:
        path = directory / "config.json"
        known = {**json.loads(path.read_text()), **changes}
        path.write_text(json.dumps({k: v for k, v in known.items() if v is not None}))

    return change


def last_shard(directory: Path) -> Path:
    return sorted(directory.glob("*.safetensors"))[-1]


def truncate(directory: Path) -> None:
    shard = last_shard(directory)
    shard.write_bytes(shard.read_bytes()[:-1000])


def forget_tokenizer(directory: Path) -> None:
    for path in directory.glob("tokenizer*"):
        path.unlink()


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (config(model_type="llama9"), "mlx-lm cannot run llama9 models"),
        (config(num_hidden_layers=None), "cannot build the llama model .* 'num_hidden_layers'"),
        (config(num_hidden_layers=-1), "num_hidden_layers = -1; that cannot be right"),
        (truncate, r"model-00002-of-00002\.safetensors is damaged or incomplete"),
        (forget_tokenizer, "has no tokenizer"),
    ],
    ids=["architecture", "layers", "no layers", "truncated", "tokenizer"],
)
async def test_what_cannot_be_described(
    sound: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    directory = shutil.copytree(sound, tmp_path / "broken")
    assert (await source(tmp_path).describe(str(sound))).layers == 6
    damage(directory)
    with pytest.raises((ModelError, ExecutorError), match=message) as caught:
        await source(tmp_path).describe(str(directory))
    assert "\n" not in str(caught.value)


async def test_an_index_that_names_a_file_that_is_not_there(sound: Path, tmp_path: Path) -> None:
    directory = shutil.copytree(sound, tmp_path / "broken")
    last_shard(directory).unlink()
    models = source(tmp_path)
    words = r"broken has no model-00002-of-00002\.safetensors, which its model\.safetensors\.index"
    with pytest.raises(ModelError, match=words):
        await models.directory(str(directory), "", 0, 6, lambda done, words="": None)
