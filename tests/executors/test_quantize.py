"""Quantised copies, made in a worker process, against those of mlx-lm's own command."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import trio

from pxd.executors import quantize_model
from pxd.executors.process import worker_environment
from pxd.executors.protocol import ExecutorError
from pxd.models.catalog import DEMO_DIRECTORY
from tests.models.files import write_model

pytestmark = pytest.mark.slow

BITS = 4


@pytest.fixture
def source(tmp_path: Path) -> Path:
    """Its configuration names another type than the weights have, and it has one more file."""
    source = Path(shutil.copytree(DEMO_DIRECTORY, tmp_path / "source"))
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"torch_dtype": "float16"}))
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6}))
    return source


def content(directory: Path) -> dict[str, bytes]:
    files = (path for path in directory.iterdir() if path.name != "README.md")
    return {path.name: path.read_bytes() for path in files}


async def test_a_copy_is_what_mlx_lm_makes(source: Path, tmp_path: Path) -> None:
    seen: list[float] = []
    await quantize_model(source, tmp_path / "ours", BITS, seen.append)
    theirs = tmp_path / "theirs"
    command = [sys.executable, "-m", "mlx_lm", "convert", "-q", "--q-bits", str(BITS)]
    paths = ["--hf-path", str(source), "--mlx-path", str(theirs)]
    # A tokenizer's configuration says whether it was read without a network.
    await trio.run_process([*command, *paths], stdout=subprocess.DEVNULL, env=worker_environment())
    assert content(tmp_path / "ours") == content(theirs)
    assert seen == sorted(seen)
    assert len(seen) > 10
    assert seen[-1] == 1.0


async def test_what_cannot_be_made_is_an_error(source: Path, tmp_path: Path) -> None:
    target = tmp_path / "target"
    odd = write_model(tmp_path / "odd")
    with pytest.raises(ExecutorError, match=r"mlx-lm cannot convert .*odd: "):
        await quantize_model(odd, target, BITS, lambda _: None)
    target.mkdir()
    with pytest.raises(ExecutorError, match="FileExistsError"):
        await quantize_model(source, target, BITS, lambda _: None)
