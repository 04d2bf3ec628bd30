"""Which daemon a command talks to."""

from pathlib import Path

import pytest

from pxd.cli.find import Found, NoDaemon, NotRunning, as_url, find_daemon

from .tools import ended_pid, write_daemon_file


@pytest.mark.parametrize(
    ("node", "url"),
    [
        ("http://127.0.0.1:8470", "http://127.0.0.1:8470"),
        ("http://127.0.0.1:8470/v1/", "http://127.0.0.1:8470"),
        ("https://ben.example", "https://ben.example"),
        ("ben:8470", "http://ben:8470"),
        ("[::1]:8470", "http://[::1]:8470"),
    ],
)
def test_a_node_is_named_by_url_or_host_and_port(node: str, url: str) -> None:
    assert as_url(node) == url


@pytest.mark.parametrize("node", ["", "ftp://x", "http://", "x:99999", "x:0", "[::1:8470", ":80"])
def test_what_is_no_url(node: str) -> None:
    with pytest.raises(NoDaemon, match="looks like http://"):
        as_url(node)


def test_the_order(tmp_path: Path, default_instance: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_daemon_file(default_instance, "http://127.0.0.1:1")
    write_daemon_file(tmp_path / "other", "http://127.0.0.1:2")
    assert find_daemon(None, None).url == "http://127.0.0.1:1"
    monkeypatch.setenv("PXD_NODE", "http://127.0.0.1:3")
    assert find_daemon(None, None) == Found("http://127.0.0.1:3")
    assert find_daemon(None, tmp_path / "other").url == "http://127.0.0.1:2"
    assert find_daemon("http://127.0.0.1:4", tmp_path / "other").url == "http://127.0.0.1:4"


def test_no_daemon(default_instance: Path) -> None:
    with pytest.raises(NotRunning, match=f"--data-dir {default_instance}.*--node URL"):
        find_daemon(None, None)


def test_a_daemon_that_died(default_instance: Path) -> None:
    write_daemon_file(default_instance, "http://127.0.0.1:1", ended_pid())
    with pytest.raises(NotRunning, match="without saying goodbye"):
        find_daemon(None, None)


@pytest.mark.parametrize("content", ["", "{}", '{"pid": "x", "http": 5, "started": 0}', "\x00"])
def test_a_damaged_file(default_instance: Path, content: str) -> None:
    (default_instance / "daemon.json").write_text(content)
    with pytest.raises(NoDaemon, match="damaged"):
        find_daemon(None, None)
