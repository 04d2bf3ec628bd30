"""Every kind of attention and state that mlx-lm has, in 1, 2 and 3 stages and in batches.

One architecture of each kind; `scripts/architectures` goes through all of them.
"""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    "qwen3",
    "gemma3",
    "gpt_oss",
    "deepseek_v3",
    "qwen3_next",
    # More than the hidden state crosses cuts, here in other types of numbers.
    "rwkv7",
    "kimi_k3 --quantize 4 --dtype bfloat16",
    "gemma4_text --splits=1,2",
    "qwen3 --quantize 4 --dtype bfloat16 --shards 2",
    "llama --quantize 8 --dtype bfloat16",
    "qwen3_moe --quantize mxfp4",
    "gemma3_text --dtype bfloat16",
]


def run(check: str, directory: Path) -> "subprocess.CompletedProcess[str]":
    architecture, *options = check.split()
    command = [sys.executable, "-m", "tests.without_torch", "tests.executors.architecture_check"]
    return subprocess.run(
        [*command, architecture, str(directory), *options],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS)
def test_tokens_equal_those_of_mlx_lm(check: str, tmp_path: Path) -> None:
    result = run(check, tmp_path)
    assert result.returncode == 0, result.stderr[-4000:]
