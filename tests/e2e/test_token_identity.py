"""A cluster of any size answers greedily exactly as `mlx_lm.generate` on the same directory."""

import json
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import pxd.models
from tests.tiny_models import make_tiny_model

from .daemons import cluster

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

DEMO = Path(pxd.models.__file__).parent / "demo"
QUESTIONS = ("Count from 1 to 20.", "Say the alphabet.", "tell me something " * 12)
MAX_TOKENS = 40
NAMES = ("anna", "ben", "carl")
# MLX multiplies experts in float32 alone on a CPU.
DTYPES = {"qwen3_moe": "float32", "gemma3": "bfloat16", "gpt_oss": "float32"}


def reference(model: Path) -> list[dict[str, Any]]:
    command = [sys.executable, "-m", "tests.e2e.reference", str(model), str(MAX_TOKENS), *QUESTIONS]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    answers: list[dict[str, Any]] = json.loads(done.stdout.splitlines()[-1])
    return answers


@pytest.fixture(scope="module")
def directories(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("models")
    made = {"demo": DEMO}
    for name in DTYPES:
        made[name] = make_tiny_model(name, root / name, dtype=DTYPES[name])
    return made


@pytest.mark.parametrize(
    ("architecture", "speculate"),
    [("demo", "on"), ("qwen3_moe", "on"), ("gemma3", "auto"), ("gpt_oss", "off")],
)
def test_greedy_answers_are_those_of_mlx_lm(
    architecture: str, speculate: str, directories: dict[str, Path], tmp_path: Path
) -> None:
    directory = directories[architecture]
    name = "demo" if architecture == "demo" else str(directory)
    config = json.loads((directory / "config.json").read_text())
    layers = config.get("text_config", config)["num_hidden_layers"]
    expected = reference(directory)
    # How the others are cut at each layer is tested without daemons.
    for count in (1, 2, 3) if architecture == "demo" else (3,):
        # No fewer nodes than these can hold the model.
        most = str(math.ceil(layers / count))
        options = ("--model", name, "--max-layers", most, "--speculate", speculate)
        with cluster(tmp_path / str(count), NAMES[:count], *options) as daemons:
            for question, answer in zip(QUESTIONS, expected, strict=True):
                response = daemons[-1].chat(question, max_tokens=MAX_TOKENS, model=name).json()
                assert response["usage"]["completion_tokens"] == len(answer["tokens"])
                assert response["choices"][0]["message"]["content"] == answer["text"]
