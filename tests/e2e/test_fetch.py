"""Three daemons, one of which has the model, and no hub: the others get what they need from it."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.tiny_models import make_tiny_model

from .daemons import Daemon, own_stages, serving_on

pytestmark = [pytest.mark.slow, pytest.mark.clusters]

NAMES = ("anna", "ben", "carl")
MODEL = "acme/tiny"
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


def test_it(three):
    for d in three:
        print(d.log, own_stages(d.status()))
    print(three[1].answer("hi", max_tokens=5))
