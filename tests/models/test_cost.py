import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

from pxd.executors.mlx.describe import describe
from pxd.models.cost import read_cost
from pxd.models.describe import describe_checkpoint
from pxd.models.errors import ModelError
from pxd.planning.cost.config import cost_from_config
from pxd.planning.model import ModelCost
from tests.models.files import model_shapes, write_model, write_sharded
from tests.tiny_models import make_tiny_model

CONFIG: dict[str, Any] = {
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "intermediate_size": 16,
    "tie_word_embeddings": False,
}


def formula(directory: Path) -> ModelCost:
    return cost_from_config(json.loads((directory / "config.json").read_text()))


def sharded(directory: Path) -> Path:
    write_sharded(directory, model_shapes())
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **CONFIG}))
    return directory


def test_weights_that_are_there_give_exact_sizes(tmp_path: Path) -> None:
    for directory in (write_model(tmp_path / "one", config=CONFIG), sharded(tmp_path / "many")):
        cost = read_cost(directory)
        assert cost.layer_bytes == (128, 256, 384)
        assert (cost.embedding_bytes, cost.head_bytes, cost.tied) == (160, 16 + 160, False)
        assert cost.layer_flops == formula(directory).layer_flops


def test_an_index_alone_scales_the_formulas_to_its_total(tmp_path: Path) -> None:
    whole = read_cost(sharded(tmp_path / "whole"))
    directory = sharded(tmp_path / "partly")
    (directory / "model-00002-of-00003.safetensors").unlink()
    cost = read_cost(directory)
    total = sum(whole.layer_bytes) + whole.ends_bytes
    assert sum(cost.layer_bytes) + cost.ends_bytes == pytest.approx(total, abs=10)
    assert len(set(cost.layer_bytes)) == 1
    assert cost.kv_bytes_per_token == whole.kv_bytes_per_token


def test_an_index_tells_whether_the_ends_are_tied(tmp_path: Path) -> None:
    directory = sharded(tmp_path)
    path = directory / "model.safetensors.index.json"
    index = json.loads(path.read_text())
    del index["weight_map"]["lm_head.weight"]
    path.write_text(json.dumps(index))
    for file in directory.glob("*.safetensors"):
        file.unlink()
    assert read_cost(directory).tied


def test_a_configuration_alone_is_enough(tmp_path: Path) -> None:
    directory = write_model(tmp_path, config=CONFIG)
    (directory / "model.safetensors").unlink()
    assert read_cost(directory) == formula(directory)


@pytest.mark.parametrize(
    ("text", "complaint"),
    [
        ("{", "damaged"),
        ("[]", "no object"),
        (json.dumps({"hidden_size": -1}), "num_hidden_layers"),
        (json.dumps({"num_hidden_layers": 2, "hidden_size": -1}), "hidden_size = -1"),
    ],
)
def test_what_cannot_be_right_is_one_clear_line(tmp_path: Path, text: str, complaint: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ModelError, match=complaint) as caught:
        read_cost(tmp_path)
    assert str(tmp_path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_no_configuration(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"config\.json"):
        read_cost(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("architecture", "quantize"),
    [("qwen3", "4"), ("deepseek_v3", ""), ("gemma3", ""), ("qwen3_next", "")],
)
def test_real_models_cost_what_their_files_and_mlx_say(
    tmp_path: Path, architecture: str, quantize: str
) -> None:
    directory = make_tiny_model(architecture, tmp_path, quantize=quantize, dtype="bfloat16")
    cost, files, engine = read_cost(directory), describe_checkpoint(directory), describe(directory)
    assert cost.layer_bytes == files.layer_bytes
    assert cost.embedding_bytes == files.embedding_bytes
    assert (cost.head_bytes, cost.tied) == (files.head_bytes, files.tied)
    assert cost.kv_bytes_per_token == engine.kv_bytes_per_token
    assert cost.splits == engine.splits
    # The formulas alone come near, although norms weigh more in a model this small.
    near = formula(directory)
    assert sum(near.layer_bytes) == pytest.approx(sum(cost.layer_bytes), rel=0.03)
    experts = [one and one.bytes_each for one in near.experts]
    assert experts == [one and one.bytes_each for one in cost.experts]
    sizes = ("layer_bytes", "embedding_bytes", "head_bytes", "experts")
    same = {name: getattr(cost, name) for name in sizes}
    assert msgspec.structs.replace(near, **same) == cost
