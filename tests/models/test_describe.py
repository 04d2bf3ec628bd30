import json
from pathlib import Path
from typing import Any

import pytest

from pxd.models.describe import INDEX_NAME, describe_checkpoint
from pxd.models.errors import ModelError
from tests.models.files import (
    CONFIG,
    layer_shapes,
    model_shapes,
    write_model,
    write_raw,
    write_sharded,
)


def test_bytes_are_exact(tmp_path: Path) -> None:
    untied = describe_checkpoint(write_model(tmp_path / "untied"))
    assert untied.layer_bytes == (128, 256, 384)
    assert (untied.embedding_bytes, untied.head_bytes, untied.tied) == (160, 16 + 160, False)
    tied = describe_checkpoint(write_model(tmp_path / "tied", model_shapes(tied=True)))
    assert (tied.embedding_bytes, tied.head_bytes, tied.tied) == (160, 16 + 160, True)
    assert untied.exact
    assert untied.missing == ()


def test_only_the_language_model_counts(tmp_path: Path) -> None:
    shapes = {
        **{f"language_model.{name}": shape for name, shape in model_shapes().items()},
        **layer_shapes(3, "vision_tower.encoder.layers."),
        **{
            f"vision_tower.encoder.layers.{i}.norm.{j}": ("F32", (9,))
            for i in range(3)
            for j in "ab"
        },
        "multi_modal_projector.weight": ("F32", (100,)),
        "language_model.model.layers.3.eh_proj.weight": ("BF16", (64,)),
        "language_model.mtp.layers.0.weight": ("BF16", (64,)),
    }
    config = {"num_hidden_layers": None, "text_config": {"num_hidden_layers": 3}}
    checkpoint = describe_checkpoint(write_model(tmp_path, shapes, config))
    assert checkpoint.layer_prefix == "language_model.model.layers."
    assert checkpoint.layer_bytes == (128, 256, 384)
    assert (checkpoint.embedding_bytes, checkpoint.head_bytes) == (160, 176)


def test_layers_without_numbers_are_shared_out_evenly(tmp_path: Path) -> None:
    shapes = {"model.embed_tokens.weight": ("BF16", (10, 8)), "model.all.weight": ("BF16", (150,))}
    checkpoint = describe_checkpoint(write_model(tmp_path, shapes))
    assert checkpoint.layer_prefix is None
    assert checkpoint.layer_bytes == (100, 100, 100)


def test_what_a_configuration_leaves_out_is_none_or_comes_from_the_names(tmp_path: Path) -> None:
    absent = dict.fromkeys(("num_hidden_layers", "vocab_size", "max_position_embeddings"))
    checkpoint = describe_checkpoint(write_model(tmp_path, config=absent))
    assert checkpoint.layers == 3
    assert checkpoint.vocabulary is None
    assert checkpoint.context is None
    with pytest.raises(ModelError, match="tell the layers"):
        describe_checkpoint(write_model(tmp_path, {"weight": ("F32", (1,))}, absent))


def test_the_fingerprint_tells_models_apart_but_not_places(tmp_path: Path) -> None:
    def fingerprint(name: str, **changes: Any) -> str:
        return describe_checkpoint(write_model(tmp_path / name, **changes)).fingerprint

    first = fingerprint("a")
    assert fingerprint("b", config={"_name_or_path": "/somewhere/else"}) == first
    assert fingerprint("c", config={"rope_theta": 5.0}) != first
    assert fingerprint("e", shapes=model_shapes(tied=True)) != first


def test_parts_of_a_sharded_model_have_one_fingerprint(tmp_path: Path) -> None:
    shapes = model_shapes()
    whole = describe_checkpoint(write_sharded(tmp_path / "whole", shapes))
    part = write_sharded(tmp_path / "part", shapes)
    for file in part.glob("*.safetensors"):
        file.unlink()
    estimated = describe_checkpoint(part)
    assert estimated.fingerprint == whole.fingerprint
    assert not estimated.exact
    assert len(estimated.missing) == 3
    total = sum(whole.layer_bytes) + whole.embedding_bytes + whole.head_bytes
    guess = sum(estimated.layer_bytes) + estimated.embedding_bytes + estimated.head_bytes
    assert 0.9 * total < guess < 1.1 * total
    assert estimated.embedding_bytes == 160


def test_a_stage_needs_only_the_files_of_its_layers(tmp_path: Path) -> None:
    checkpoint = describe_checkpoint(write_sharded(tmp_path, model_shapes(), shards=6))
    names = checkpoint.shards
    assert checkpoint.files_for(1, 2) == (names["model.layers.1.mlp.weight"],)
    ends = {names["model.embed_tokens.weight"], names["model.norm.weight"], names["lm_head.weight"]}
    assert set(checkpoint.files_for(0, 1)) == {names["model.layers.0.mlp.weight"], *ends}
    assert set(checkpoint.files_for(2, 3)) == {names["model.layers.2.mlp.weight"], *ends}
    assert len(checkpoint.files_for(0, 3)) == 6


@pytest.mark.parametrize(
    "name", ["../model.safetensors", "/etc/passwd", "sub/model.safetensors", "model.bin", "evil.py"]
)
def test_an_index_may_only_name_weight_files_beside_it(tmp_path: Path, name: str) -> None:
    write_sharded(tmp_path, model_shapes())
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["model.norm.weight"] = name
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match="which is no model"):
        describe_checkpoint(tmp_path)


def test_a_shard_that_lacks_what_the_index_promises_is_refused(tmp_path: Path) -> None:
    write_sharded(tmp_path, model_shapes())
    index = json.loads((tmp_path / INDEX_NAME).read_text())
    index["weight_map"]["model.extra.weight"] = "model-00001-of-00003.safetensors"
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    with pytest.raises(ModelError, match=r"lacks model\.extra\.weight"):
        describe_checkpoint(tmp_path)


def test_pickled_weights_are_refused(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(ModelError, match="pickle"):
        describe_checkpoint(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"num_hidden_layers": 10**9}, "cannot be right"),
        ({"num_hidden_layers": 0}, "cannot be right"),
        ({"model_type": "../evil"}, "model_type"),
        ({"model_type": 5}, "model_type"),
        ({"vocab_size": -5}, "cannot be right"),
    ],
)
def test_absurd_configurations_are_refused(
    tmp_path: Path, config: dict[str, Any], message: str
) -> None:
    with pytest.raises(ModelError, match=message):
        describe_checkpoint(write_model(tmp_path, config=config))


@pytest.mark.parametrize("content", [b"", b"[1]", b"{", b"[" * 100_000, b"\xff\xfe"])
def test_a_damaged_configuration_is_refused(tmp_path: Path, content: bytes) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_bytes(content)
    with pytest.raises(ModelError, match=r"config\.json is damaged"):
        describe_checkpoint(tmp_path)


def test_what_is_absent_is_named(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match="no directory"):
        describe_checkpoint(tmp_path / "nowhere")
    with pytest.raises(ModelError, match=r"no config\.json"):
        describe_checkpoint(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    with pytest.raises(ModelError, match=r"no model\*\.safetensors"):
        describe_checkpoint(tmp_path)
    write_raw(tmp_path / "model.safetensors", b"{}")
    assert describe_checkpoint(tmp_path).layer_bytes == (0, 0, 0)


def test_ends_of_an_answer_come_from_the_generation_config_first(tmp_path: Path) -> None:
    assert describe_checkpoint(write_model(tmp_path)).eos == (2,)
    (tmp_path / "generation_config.json").write_text('{"eos_token_id": [7, 8]}')
    assert describe_checkpoint(tmp_path).eos == (7, 8)


def test_infinity_in_a_configuration_is_fine(tmp_path: Path) -> None:
    write_model(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({**CONFIG, "limit": float("inf")}))
    assert describe_checkpoint(tmp_path).layers == 3
