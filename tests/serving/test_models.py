"""Where a model comes from: what is checked before anything of it is planned."""

from pathlib import Path

import pytest

from pxd.executors.protocol import ModelDescription
from pxd.models.errors import ModelError
from pxd.serving.models import ModelSource
from tests.models.files import write_model
from tests.tiny_models import save_tokenizer

from .leader import description


async def test_a_model_without_a_tokenizer_is_refused_until_it_has_one(tmp_path: Path) -> None:
    asked = []

    async def describe(path: Path) -> ModelDescription:
        asked.append(path)
        return description()

    models = ModelSource(describe)
    path = write_model(tmp_path / "model")
    with pytest.raises(ModelError, match="has no tokenizer"):
        await models.describe(str(path))
    save_tokenizer(path)
    assert await models.describe(str(path)) == description()
    assert await models.describe(str(path)) == description()
    assert asked == [path, path]
