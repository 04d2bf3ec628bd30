"""Models that cannot be served show in `pxd status` with the reason; all others go on."""

import shutil
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model

from .daemons import Daemon, Status, cluster, serving_on

pytestmark = [pytest.mark.slow, pytest.mark.clusters]


def reasons(status: Status, name: Path) -> str:
    """Everything that is said of a model: by its plan, and by the nodes that hold it."""
    plans = [model["reason"] for model in status["models"] if model["name"] == str(name)]
    stages = [stage["reason"] for node in status["nodes"] for stage in node["stages"]]
    return "\n".join(map(str, plans + stages))


def wait_reason(daemon: Daemon, name: Path, reason: str) -> None:
    daemon.wait_status(lambda status: reason in reasons(status, name), f"it says {reason}")
    shown = " ".join(daemon.pxd("status").stdout.split())
    assert reason in shown, shown
    assert reason in daemon.log


def test_one_clear_error_each_and_the_demo_is_served(tmp_path: Path) -> None:
    mute = make_tiny_model("llama", tmp_path / "mute", shards=3)
    torn = Path(shutil.copytree(mute, tmp_path / "torn"))
    (mute / "tokenizer.json").unlink()
    (torn / "model-00002-of-00003.safetensors").unlink()
    with cluster(tmp_path, ["anna"], "--model", str(mute), serving=False) as (anna,):
        wait_reason(anna, mute, "has no tokenizer")
        assert anna.pxd("models", "use", str(torn)).returncode == 1
        wait_reason(anna, torn, "has no model-00002-of-00003.safetensors")
        assert anna.pxd("models", "use", "demo").returncode == 0
        anna.wait_status(serving_on(1), "the demo is served")
        assert anna.answer("What is 17 + 25?", model="demo") == "42"
