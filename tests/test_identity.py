import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd import identity
from pxd.identity import IdentityError, State, Ticket
from pxd.settings import DataFiles, parse_endpoint

ADDRESS = "/ip4/192.168.1.5/tcp/8471/p2p/12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_made_once_and_private(tmp_path: Path) -> None:
    files = DataFiles(tmp_path)
    os.umask(0o022)
    seed, key = identity.node_key(files.node_key), identity.cluster_key(files.cluster_key, None)
    assert len(seed) == len(key) == 32
    assert seed != key
    assert mode(files.node_key) == mode(files.cluster_key) == 0o600
    assert identity.node_key(files.node_key) == seed
    assert identity.cluster_key(files.cluster_key, None) == key


def test_a_key_that_others_can_read_is_made_private(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(bytes(32))
    path.chmod(0o644)
    identity.node_key(path)
    assert mode(path) == 0o600


def test_a_damaged_key_is_not_replaced(tmp_path: Path) -> None:
    path = tmp_path / "node.key"
    path.write_bytes(b"short")
    with pytest.raises(IdentityError, match="damaged"):
        identity.node_key(path)
    assert path.read_bytes() == b"short"


@given(st.binary(min_size=32, max_size=32), st.lists(st.text(min_size=1, max_size=60), max_size=32))
def test_tickets_survive_copying(key: bytes, addresses: list[str]) -> None:
    ticket = Ticket(key, tuple(addresses))
    line = str(ticket)
    assert line.isascii()
    assert " " not in line
    assert "\n" not in line
    assert Ticket.parse(f"  {line}\n") == ticket


@given(st.text(max_size=80) | st.text(max_size=80).map("pxd1".__add__))
def test_what_is_no_ticket_is_refused_in_words(text: str) -> None:
    with pytest.raises(IdentityError, match="pxd ticket"):
        Ticket.parse(text)


def test_a_ticket_is_remembered_and_another_cluster_refused(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    first, second = Ticket(b"a" * 32, (ADDRESS,)), Ticket(b"b" * 32, ())
    assert identity.cluster_key(path, first) == b"a" * 32
    assert identity.cluster_key(path, first) == b"a" * 32
    assert identity.cluster_key(path, None) == b"a" * 32
    with pytest.raises(IdentityError, match="another cluster"):
        identity.cluster_key(path, second)


def test_state_survives_and_damage_is_not_guessed_around(tmp_path: Path) -> None:
    path = tmp_path / "state.json"
    assert identity.read_state(path) == State()
    state = State(incarnation=3, term=9, choice=(2, "peer", "demo"))
    identity.write_state(path, state)
    assert identity.read_state(path) == state
    path.write_bytes(b"{")
    with pytest.raises(IdentityError, match="damaged"):
        identity.read_state(path)


def test_a_failed_write_leaves_the_old_file(tmp_path: Path, monkeypatch) -> None:
    path = tmp_path / "state.json"
    identity.write_state(path, State(incarnation=1))

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        identity.write_state(path, State(incarnation=2))
    assert identity.read_state(path) == State(incarnation=1)
    assert [entry.name for entry in tmp_path.iterdir()] == ["state.json"]


def test_one_daemon_per_data_directory(tmp_path: Path) -> None:
    path = tmp_path / "daemon.lock"
    code = f"from pxd.identity import *; lock_data_dir(Path({str(path)!r}))"
    with identity.lock_data_dir(path):
        second = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert second.returncode == 1
        assert "already runs" in second.stderr
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_data_directory_that_cannot_be_used(tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.touch()
    with pytest.raises(IdentityError, match="--data-dir"):
        identity.prepare_data_dir(blocked / "inside")
    identity.prepare_data_dir(tmp_path / "a" / "b")
    assert mode(tmp_path / "a" / "b") == 0o700


@pytest.mark.parametrize(
    ("text", "endpoint"),
    [("127.0.0.1:80", ("127.0.0.1", 80)), ("[::1]:0", ("::1", 0)), ("host:65535", ("host", 65535))],
)
def test_endpoints(text: str, endpoint: tuple[str, int]) -> None:
    assert parse_endpoint(text) == endpoint


@pytest.mark.parametrize("text", ["", "8080", ":80", "host:", "host:-1", "host:65536", "host:x"])
def test_bad_endpoints(text: str) -> None:
    with pytest.raises(ValueError, match="HOST:PORT"):
        parse_endpoint(text)
