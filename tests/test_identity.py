import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pxd import identity
from pxd.identity import IdentityError, Keyring, State, Ticket
from pxd.settings import DataFiles, parse_endpoint

ADDRESS = "/ip4/192.168.1.5/tcp/8471/p2p/12D3KooWQYV9dGMFoRzNStwpXztXaBUjtPqi6aU76ZgUriHhKust"


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_keys_are_made_once_and_private(tmp_path: Path) -> None:
    files = DataFiles(tmp_path)
    os.umask(0o022)
    seed, key = (
        identity.node_key(files.node_key),
        identity.read_keyring(files.cluster_key, None).key,
    )
    assert len(seed) == len(key) == 32
    assert seed != key
    assert mode(files.node_key) == mode(files.cluster_key) == 0o600
    assert identity.node_key(files.node_key) == seed
    assert identity.read_keyring(files.cluster_key, None) == Keyring.first(key)


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
    for ticket in (first, first, None):
        assert identity.read_keyring(path, ticket) == Keyring.first(b"a" * 32)
    # As every release before keyrings stored it.
    assert path.read_bytes() == b"a" * 32
    with pytest.raises(IdentityError, match="another cluster"):
        identity.read_keyring(path, second)
    # A cluster of its own that nobody ever joined is no loss.
    assert identity.read_keyring(path, second, alone=True) == Keyring.first(b"b" * 32)


def ticket_of(ring: Keyring) -> Ticket:
    return Ticket(ring.key, (), ring.cluster, ring.generation)


def test_a_later_ticket_of_the_same_cluster_replaces_the_key_and_an_older_one_does_not(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "cluster.key"
    rings = [Keyring.first(b"a" * 32)]
    for letter in (b"b", b"c", b"d"):
        rings.append(rings[-1].rotated(letter * 32, 0.0))
    assert identity.read_keyring(path, ticket_of(rings[0])) == rings[0]
    later = identity.read_keyring(path, ticket_of(rings[2]))
    assert (later.key, later.generation, later.cluster) == (b"c" * 32, 2, rings[0].cluster)
    assert identity.read_keyring(path, None) == later
    assert identity.read_keyring(path, ticket_of(rings[2])) == later
    assert caplog.text == ""
    for ticket in (ticket_of(rings[0]), ticket_of(rings[1])):
        assert identity.read_keyring(path, ticket) == later
        # Should this node alone have got a later key, that is the way back.
        assert f"delete {path}" in caplog.text
        caplog.clear()
    assert identity.read_keyring(path, ticket_of(rings[3])).key == b"d" * 32
    assert mode(path) == 0o600


def test_keyrings_survive_a_restart_and_damage_is_not_guessed_around(tmp_path: Path) -> None:
    path = tmp_path / "cluster.key"
    ring = Keyring.first(b"a" * 32).rotated(b"b" * 32, 1234.5)
    identity.write_keyring(path, ring)
    assert mode(path) == 0o600
    path.chmod(0o640)
    assert identity.read_keyring(path, None) == ring
    assert mode(path) == 0o600
    for damage in (b"", b"short", path.read_bytes()[:-9], b'{"key": "\xff"}', b"[" * 100_000):
        path.write_bytes(damage)
        with pytest.raises(IdentityError, match="damaged"):
            identity.read_keyring(path, None)
        assert path.read_bytes() == damage


def test_the_previous_key_counts_until_its_time() -> None:
    ring = Keyring.first(b"a" * 32).rotated(b"b" * 32, 100.0)
    assert (ring.keys(99.9), ring.retired(99.9)) == ((b"b" * 32, b"a" * 32), ())
    assert (ring.keys(100.0), ring.retired(100.0)) == ((b"b" * 32,), (b"a" * 32,))
    assert ring.grace(40.0) == 60.0
    assert Keyring.first(b"a" * 32).keys(0.0) == (b"a" * 32,)


@given(st.lists(st.tuples(st.integers(0, 5), st.binary(min_size=32, max_size=32)), min_size=1))
def test_keyrings_merge_to_the_same_in_any_order(rotations: list[tuple[int, bytes]]) -> None:
    def merge(rings: list[Keyring]) -> Keyring:
        held = rings[0]
        for ring in rings:
            held = ring if held.accepts(ring) else held
        return held

    rings = [Keyring(key=key, generation=number) for number, key in rotations]
    assert merge(rings) == merge(rings[::-1]) == merge(sorted(rings, key=lambda r: r.key))


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
