"""Whatever `pxd plan` cannot use gets one clear line and exit code 2."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.cli.tools import pxd

CARD = {"tflops_fp16": 165.0, "memory_gib": 24, "memory_bandwidth_gbps": 1008}
A = {"id": "a", **CARD}
FIELDS = {
    "hidden_dim": 1024,
    "intermediate_dim": 4096,
    "num_attention_heads": 16,
    "num_kv_heads": 8,
    "vocab_size": 32_000,
    "num_layers": 8,
}
CONFIG = {
    "model_type": "llama",
    "hidden_size": 1024,
    "intermediate_size": 4096,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "num_hidden_layers": 8,
    "vocab_size": 32_000,
}

Refusal = Callable[..., str]


@pytest.fixture
def refusal(tmp_path: Path) -> Refusal:
    """The one line on stderr, for files with these contents and for these options."""

    def run(*options: str, cluster: object = None, model: object = None) -> str:
        for name, content in (("cluster", cluster or {"nodes": [A]}), ("model", model or FIELDS)):
            raw = content if isinstance(content, bytes) else json.dumps(content).encode()
            (tmp_path / f"{name}.json").write_bytes(raw)
        result = pxd(
            *("plan", "--cluster", str(tmp_path / "cluster.json")),
            *("--model", str(tmp_path / "model.json"), *options),
        )
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr.endswith("\n")
        assert result.stderr[:-1].isprintable(), "one line, and nothing that steers a terminal"
        return result.stderr.replace(f"{tmp_path}/", "")

    return run


@pytest.mark.parametrize(
    ("cluster", "line"),
    [
        ({"nodes": [{"id": "a", "machine": "rtx-4900"}]}, "no machine 'rtx-4900'"),
        ({"nodes": [{"id": "a", "machine": "rtx-4900"}]}, "did you mean rtx-4090"),
        ({"nodes": [{**A, "memory_gib": -24}]}, "nodes[0].memory_gib: expected a number > 0"),
        ({"nodes": [{**A, "memory_gib": float("nan")}]}, "it is not JSON"),
        ({"nodes": [A], "rtt_ms": {"a": {"x": 1}}}, "rtt_ms: there is no node 'x'"),
        ({"nodes": [A, A]}, "there is another node 'a'"),
        ({"nodes": "a"}, "nodes: expected a list, got a text"),
        (b'{"nodes":\n [x', "it is not JSON: invalid character at line 2, column 3: 'x'"),
        (b" " * 10_000_000, "has more than 1 MiB"),
        ({"nodes": [{**A, "count": 2000}, {**A, "id": "b"}]}, "there are more than 2000"),
    ],
)
def test_a_cluster_file(refusal: Refusal, cluster: Any, line: str) -> None:
    message = refusal(cluster=cluster)
    assert message.startswith("pxd: cluster.json")
    assert line in message


@pytest.mark.parametrize(
    ("model", "line"),
    [
        ({**FIELDS, "num_layers": 0}, "num_layers"),
        ({**FIELDS, "num_layers": "8"}, "num_layers"),
        ({**CONFIG, "num_hidden_layers": 0}, "num_hidden_layers"),
        ({**FIELDS, "vocab_size": -1}, "vocab_size"),
        ({"nonsense": 1}, "hidden_dim"),
        ([FIELDS], "expected an object, got a list"),
        (b"{", "it is not JSON"),
        (b"[" * 100_000, "model.json"),
        (b'{"a":' * 100_000, "model.json"),
        (b" " * 2_000_000, "has more than 1 MiB"),
    ],
)
def test_a_model_file(refusal: Refusal, model: Any, line: str) -> None:
    message = refusal(model=model)
    assert message.startswith("pxd: model.json")
    assert line in message


@pytest.mark.parametrize(
    ("options", "line"),
    [
        (["--param-ratio", "0"], "--param-ratio must be above 0 and at most 1, not 0"),
        (["--param-ratio", "1.5"], "--param-ratio must be above 0 and at most 1, not 1.5"),
        (["--param-ratio", "nan"], "--param-ratio must be above 0 and at most 1, not nan"),
        (["--kv-ratio", "-1"], "--kv-ratio must be above 0 and at most 1, not -1"),
        (["--param-ratio", "0.9"], "--param-ratio 0.9 and --kv-ratio 0.2 are more than"),
        (["--what-if", "rtx-4900"], "--what-if: there is no machine 'rtx-4900' in the catalogue"),
        (["--what-if", "t4"] * 9, "--what-if: at most 8 machines at once"),
        (["--cluster", "nowhere.json"], "cannot read nowhere.json: No such file or directory"),
        (["--cluster", "/"], "cannot read /: Is a directory"),
        (["--model", "nowhere.json"], "cannot read nowhere.json: No such file or directory"),
        (["--model", "no such model"], "there is no model 'no such model'"),
        (["--model", ""], "there is no model ''"),
        (["--model", "a\x00b.json"], "a\ufffdb.json"),
        (["--model", "\x1b[31m"], "there is no model"),
    ],
)
def test_options(refusal: Refusal, options: list[str], line: str) -> None:
    assert line in refusal(*options)


def test_a_cluster_file_needs_a_model() -> None:
    result = pxd("plan", "--cluster", "home.json")
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr == ("pxd: --cluster needs a model to plan for: name it with --model\n")


def test_an_unknown_strategy() -> None:
    result = pxd("plan", "--strategy", "magic")
    assert result.exit_code == 2
    assert "magic" in result.stderr
