"""Three daemons, one of which has the model, and no hub: the others get what they need from it."""

import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from pxd.models.describe import describe_checkpoint
from pxd.models.safetensors import read_header
from tests.models.files import flip
from tests.tiny_models import make_tiny_model

from .daemons import Daemon, pipelines, serving_on

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

NAMES = ("anna", "ben", "carl")
MODEL = "acme/tiny"
QUESTION = "What is 17 + 25?"
COMMIT = "c0ffee" * 6 + "c0ff"


def hub_cache(home: Path, model: Path | None) -> dict[str, str]:
    """The environment of a machine that cannot reach the hub; its cache has `model` or nothing."""
    repository = home / "hub" / "models--acme--tiny"
    if model is not None:
        shutil.copytree(model, repository / "snapshots" / COMMIT)
        (repository / "refs").mkdir()
        (repository / "refs" / "main").write_text(COMMIT)
    return {"HF_HOME": str(home), "HF_HUB_OFFLINE": "1"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model("llama", tmp_path_factory.mktemp("models") / "tiny", shards=2)


@pytest.fixture(scope="module")
def three(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[Daemon]]:
    root = tmp_path_factory.mktemp("three")
    daemons: list[Daemon] = []
    try:
        for name in NAMES:
            there = model if name == "ben" else None
            environment = hub_cache(root / f"home-{name}", there)
            join = daemons[0].ticket() if daemons else None
            options = ("--max-layers", "2", "--model", MODEL)
            daemons.append(Daemon(root, name, *options, join=join, environment=environment))
        for daemon in daemons:
            daemon.wait_status(serving_on(3), "served by three nodes")
        yield daemons
    finally:
        for daemon in daemons:
            daemon.end()


def test_the_cluster_answers_like_one_machine(three: list[Daemon], model: Path) -> None:
    command = [sys.executable, "-m", "tests.e2e.reference", str(model), "12", QUESTION]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    [expected] = json.loads(done.stdout.splitlines()[-1])
    assert [daemon.answer(QUESTION, max_tokens=12) for daemon in three] == [expected["text"]] * 3


def test_no_byte_travels_that_a_stage_does_not_need(three: list[Daemon], model: Path) -> None:
    status = three[0].status()
    names = {node["id"]: node["name"] for node in status["nodes"]}
    [chain] = pipelines(status)
    checkpoint = describe_checkpoint(model)
    sizes = {
        tensor: info.nbytes
        for path in model.glob("*.safetensors")
        for tensor, info in read_header(path).items()
    }
    for stage in chain:
        [daemon] = [each for each in three if each.name == names[stage["node"]]]
        moved = [int(count) for count in re.findall(rf"of {MODEL}; (\d+) came", daemon.log)]
        if daemon.name == "ben":
            assert moved == []
            continue
        needed = checkpoint.tensors_for(stage["start"], stage["end"])
        assert 0 < sum(moved) <= 1.05 * sum(sizes[tensor] for tensor in needed)


def test_the_list_shows_who_has_files(three: list[Daemon]) -> None:
    listed = json.loads(three[2].pxd("models", "list", "--json").stdout)
    assert {name: MODEL in files for name, files in listed["files"].items()} == dict.fromkeys(
        NAMES, True
    )
    refused = three[2].pxd("models", "remove", MODEL)
    assert refused.returncode == 1
    assert "`pxd models stop acme/tiny` first" in refused.stderr


def test_flipped_bytes_are_noticed_and_another_source_is_used(
    three: list[Daemon], model: Path
) -> None:
    """As a disk flips them: in files that were described and hashed before, with no new time."""
    anna, ben, carl = three
    done = anna.pxd("models", "add", MODEL)
    assert done.returncode == 0, done.stderr
    rotten = ben.data_dir.parent / "home-ben" / "hub" / "models--acme--tiny" / "snapshots" / COMMIT
    flip_all(rotten)
    done = carl.pxd("models", "add", MODEL)
    flip_all(rotten)
    assert done.returncode == 0, done.stderr
    assert "ben sent damaged bytes of" in carl.log
    [kept] = (carl.data_dir / "cache" / "models").iterdir()
    for shard in model.glob("*.safetensors"):
        assert (kept / shard.name).read_bytes() == shard.read_bytes()


def flip_all(directory: Path) -> None:
    """One byte of each tensor."""
    for path in directory.glob("*.safetensors"):
        header = read_header(path)
        head = path.stat().st_size - sum(info.nbytes for info in header.values())
        for info in header.values():
            flip(path, head + info.data_offsets[1] - 1, secretly=True)


def test_a_node_that_comes_back_has_what_it_had(three: list[Daemon]) -> None:
    carl = three[2]
    before = carl.log.count("fetching")
    carl.signal(signal.SIGKILL)
    carl.process.wait()
    # What an executor had on disk, whose daemon could not tidy up after it.
    left = carl.data_dir / "scratch" / "pxd-executor-1" / "view"
    left.mkdir(parents=True)
    carl.start()
    assert carl.url
    assert not left.exists()
    carl.wait_status(serving_on(3), "served by three nodes again")
    assert carl.log.count("fetching") == before
