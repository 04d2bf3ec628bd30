import socket
from pathlib import Path

import pytest

from pxd.notify import notify


def test_the_service_manager_hears_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as manager:
        manager.bind(str(tmp_path / "notify"))
        monkeypatch.setenv("NOTIFY_SOCKET", str(tmp_path / "notify"))
        assert notify("READY=1\nSTATUS=up")
        assert manager.recv(100) == b"READY=1\nSTATUS=up"


@pytest.mark.parametrize("address", ["", "relative"])
def test_where_nobody_listens_nothing_happens(
    address: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("NOTIFY_SOCKET", address)
    assert not notify("READY=1")
