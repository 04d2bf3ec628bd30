from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.api.fakes import LiveServer, live_server


@pytest.fixture(autouse=True)
def default_instance(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where the default instance would live: never this machine's real one."""
    root = tmp_path / "default"
    root.mkdir()
    for name in ("PXD_NODE", "PXD_JOIN", "JOURNAL_STREAM"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PXD_DATA_DIR", str(root))
    return root


@pytest.fixture
def server() -> Iterator[LiveServer]:
    with live_server() as server:
        yield server
