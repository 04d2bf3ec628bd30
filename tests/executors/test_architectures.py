"""Every kind of attention and state that mlx-lm has, in 1, 2 and 3 stages and in batches."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
CHECKS = [
    ["qwen3"],
    ["llama", "--shards", "3"],
    ["qwen3_moe"],
    ["gemma3_text"],
    ["gemma3"],
    ["gpt_oss"],
    ["mixtral"],
    ["deepseek_v2"],
    ["deepseek_v3"],
    ["qwen3_next"],
    ["olmo_hybrid"],
    ["gemma2"],
    ["rwkv7", "--splits", ""],
    ["qwen3", "--quantize", "--dtype", "bfloat16", "--shards", "2"],
    ["gemma3_text", "--dtype", "bfloat16"],
    ["llama", "--dtype", "float16"],
]


@pytest.mark.slow
@pytest.mark.parametrize("check", CHECKS, ids=" ".join)
def test_tokens_equal_those_of_mlx_lm(check: list[str], tmp_path: Path) -> None:
    architecture, *options = check
    result = subprocess.run(
        [
            sys.executable,
            "-m",
            "tests.executors.architecture_check",
            architecture,
            str(tmp_path / "model"),
            *options,
        ],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
