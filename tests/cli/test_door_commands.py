"""`pxd key rotate` and `pxd kick`, against a served fake daemon."""

import json
from pathlib import Path

import pytest

from pxd.cli.key import parse_duration
from tests.api.fakes import PEERS, LiveServer

from .tools import pxd, write_daemon_file


@pytest.fixture(autouse=True)
def instance(server: LiveServer, default_instance: Path) -> None:
    write_daemon_file(default_instance, server.url)


def test_rotation_says_what_to_do_next(server: LiveServer) -> None:
    result = pxd("key", "rotate")
    assert result.exit_code == 0, result.stderr
    assert server.daemon.door.grace == 86400
    assert "still opens the door for 24 h" in result.stdout
    assert "`pxd ticket` prints a new one" in result.stdout
    assert f"Not confirmed yet by carl ({PEERS['carl']})" in result.stdout
    assert "1 other node confirmed it" in result.stdout


def test_rotation_at_once(server: LiveServer) -> None:
    result = pxd("key", "rotate", "--grace", "0")
    assert server.daemon.door.grace == 0
    assert "opens the door no more" in result.stdout
    assert "--join TICKET" in result.stdout


def test_rotation_for_programs() -> None:
    content = json.loads(pxd("key", "rotate", "--json", "--grace", "2m").stdout)
    assert (content["generation"], content["grace"]) == (1, 120)
    assert content["told"]["unconfirmed"] == [{"id": PEERS["carl"], "name": "carl"}]


def test_rotation_refused() -> None:
    result = pxd("key", "rotate", "--grace", "31d")
    assert (result.exit_code, result.stdout) == (1, "")
    assert "between 0 and 30 days" in result.stderr


@pytest.mark.parametrize(
    ("text", "seconds"),
    [("0", 0), ("90", 90), ("90s", 90), ("1.5m", 90), ("24h", 86400), ("7d", 604800)],
)
def test_lengths_of_time(text: str, seconds: float) -> None:
    assert parse_duration(text) == seconds


@pytest.mark.parametrize("text", ["", "h", "-1h", "1w", "nan", "1e9", "9" * 400])
def test_what_is_no_length_of_time(text: str) -> None:
    with pytest.raises(ValueError, match="looks like"):
        parse_duration(text)
    assert pxd("key", "rotate", f"--grace={text}").exit_code == 2


def test_kick_list_and_undo(server: LiveServer) -> None:
    assert "Nobody is banned" in pxd("kick", "--list").stdout
    kicked = pxd("kick", "ben")
    assert kicked.exit_code == 0, kicked.stderr
    assert f"ben ({PEERS['ben']}) is banned" in kicked.stdout
    assert "run `pxd key rotate --grace 0` next" in kicked.stdout
    assert server.daemon.door.grace is None
    assert f"{PEERS['ben']}  ben  banned by {PEERS['anna']}" in pxd("kick", "--list").stdout
    listed = json.loads(pxd("kick", "--list", "--json").stdout)
    assert listed == {"bans": [{"id": PEERS["ben"], "name": "ben", "by": PEERS["anna"]}]}
    pardoned = pxd("kick", "--undo", "ben")
    assert "may come in again" in pardoned.stdout
    assert not server.daemon.door.bans


def test_kick_and_rotate(server: LiveServer) -> None:
    result = pxd("kick", "--rotate", "ben")
    assert server.daemon.door.grace == 0
    assert "opens the door no more" in result.stdout
    assert "next" not in result.stdout
    assert json.loads(pxd("kick", "--rotate", "--json", "ben").stdout)["rotation"]["grace"] == 0


def test_kick_of_oneself_and_of_nobody() -> None:
    own = pxd("kick", "anna")
    assert (own.exit_code, own.stdout) == (1, "")
    assert "`pxd stop`" in own.stderr
    assert "no such node: 'nobody'" in pxd("kick", "nobody").stderr


@pytest.mark.parametrize(
    "arguments",
    [[], ["ben", "--list"], ["ben", "--undo", "--rotate"], ["--list", "--undo"], ["--undo"]],
)
def test_kick_with_options_that_make_no_sense(server: LiveServer, arguments: list[str]) -> None:
    result = pxd("kick", *arguments)
    assert result.exit_code == 2
    assert not server.daemon.door.bans


def test_help_has_examples() -> None:
    shown = pxd("key", "rotate", "--help").stdout.replace("\N{NO-BREAK SPACE}", " ")
    assert "pxd key rotate --grace 0" in shown
    assert "rotate" in pxd("key", "--help").stdout
