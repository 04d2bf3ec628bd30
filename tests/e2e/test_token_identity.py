"""A cluster of any size answers greedily exactly as `mlx_lm.generate` on the same directory."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pxd.models.catalog import DEMO_DIRECTORY
from tests.tiny_models import make_tiny_model

from .daemons import Status, cluster

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

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


# How models are cut at each layer is tested without daemons.
@pytest.mark.parametrize(
    ("architectures", "count", "most_layers", "speculate"),
    [
        (["demo"], 1, "8", "on"),
        (["demo", "qwen3_moe"], 3, "3", "on"),
        (["gemma3", "gpt_oss"], 3, "2", "auto"),
    ],
    ids=str,
)
def test_greedy_answers_are_those_of_mlx_lm(
    architectures: list[str], count: int, most_layers: str, speculate: str, tmp_path: Path
) -> None:
    models = {"demo": DEMO_DIRECTORY} if "demo" in architectures else {}
    for architecture in architectures:
        if architecture in DTYPES:
            path = make_tiny_model(
                architecture, tmp_path / architecture, dtype=DTYPES[architecture]
            )
            models[str(path)] = path
    first, *others = models

    def served(status: Status) -> bool:
        return [m["name"] for m in status["models"] if m["state"] == "serving"] == list(models)

    options = ("--model", first, "--max-layers", most_layers, "--speculate", speculate)
    with cluster(tmp_path, NAMES[:count], *options) as daemons:
        for name in others:
            used = daemons[0].pxd("models", "use", "--no-wait", name)
            assert used.returncode == 0, used.stderr
        status = daemons[-1].wait_status(served, "all models are served")
        lines = [line for model in status["models"] for line in model["pipelines"]]
        assert all((len(line) > 1) == (count > 1) for line in lines)
        for name, path in models.items():
            for question, answer in zip(QUESTIONS, reference(path), strict=True):
                response = daemons[-1].chat(question, max_tokens=MAX_TOKENS, model=name).json()
                assert response["usage"]["completion_tokens"] == len(answer["tokens"])
                assert response["choices"][0]["message"]["content"] == answer["text"]
